"""Log-probabilities of continuations, as the harness wants them: a sum, and whether greedy decoding
would give the same tokens.

In:    a model; pairs of token ids: a context, and the continuation that is scored after it
Out:   (log-probability, is greedy) of each pair, in the order they came
State: none

A causal model reads rows of different length in one batch, padded on the right, where it never
looks. A model that is not causal would see the padding: its rows are batched by their exact length.
Scores are computed at the requested positions only, a few at a time: (B, T, V) never
exists.

B batch rows, T time, D hidden_size, V vocab_size, n some positions
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from core.contracts import LanguageModel, Readout, plain_batch
from core.models.readout import full_scores

SCORES_AT_ONCE = 1 << 24
"""Numbers of one chunk of scores: 64 MB."""

Pair = tuple[list[int], list[int]]
"""Token ids of a context, and of the continuation after it."""
ReportProgress = Callable[[int, int], None]
"""Called with how many of how many rows are done; may raise, to stop."""


@dataclass(frozen=True)
class ScoredSpan:
    """A part of a continuation that is scored in one row."""

    pair: int  # which pair it belongs to
    targets: tuple[int, ...]
    end: int  # the targets are predicted at the positions before this one


@dataclass(frozen=True)
class Scorer:
    """Scores text under a model in evaluation mode."""

    model: LanguageModel
    context: int  # tokens it can see
    batch_size: int
    dtype: torch.dtype = torch.float32  # of matrix products; the scores themselves are fp32 always

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def longest(self) -> int:
        """The number of tokens that can be scored in one row, after one token to begin with."""
        return self.context if self.model.is_causal else self.context - 1

    def loglikelihoods(
        self, pairs: list[Pair], progress: ReportProgress = lambda done, total: None
    ) -> list[tuple[float, bool]]:
        """Return (log-probability of the continuation after the context, whether each of its tokens
        is the likeliest) of each pair.

        What does not fit is left out at the beginning of the context, which must not be empty; a
        continuation longer than the model's context is scored in several spans.
        """
        # equal rows are read once: answers of one letter
        rows: dict[tuple[int, ...], list[ScoredSpan]] = {}
        for number, (context, continuation) in enumerate(pairs):
            for ids, span in self._rows(number, context, continuation):
                rows.setdefault(ids, []).append(span)
        sums, greedy, done = [0.0] * len(pairs), [True] * len(pairs), 0
        for batch in self._batches(list(rows)):
            for span, logs, hits in self._score([(ids, rows[ids]) for ids in batch]):
                sums[span.pair] += sum(logs)
                greedy[span.pair] &= all(hits)
            done += len(batch)
            progress(done, len(rows))
        return list(zip(sums, greedy))

    def token_logprobs(self, context: list[int], continuation: list[int]) -> list[float]:
        """Return the log-probability of each token of one continuation, read as above."""
        rows = self._rows(0, context, continuation)
        return [
            log for row, span in rows for _, logs, _ in self._score([(row, [span])]) for log in logs
        ]

    def _rows(
        self, number: int, context: list[int], continuation: list[int]
    ) -> Iterator[tuple[tuple[int, ...], ScoredSpan]]:
        """Yield the rows that score one pair: (what is read, what is scored in it)."""
        assert context, "the first token must follow something"
        whole, begin = [*context, *continuation], len(context)
        for at in range(0, len(continuation), self.longest):
            targets = tuple(continuation[at : at + self.longest])
            seen = whole[: begin + at + len(targets)]
            if self.model.is_causal:
                # nothing sees the last token: it need not be read
                ids = tuple(seen[-(self.context + 1) : -1])
                yield ids, ScoredSpan(number, targets, end=len(ids))
            else:
                # everything sees everything: the whole is read, as it was in training and as is
                # published
                ids = tuple(seen[-self.context :])
                yield ids, ScoredSpan(number, targets, end=len(ids) - 1)

    def _batches(self, rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Yield batches, longest rows first, so that memory runs out at once or never."""
        batch: list[tuple[int, ...]] = []
        for ids in sorted(rows, key=len, reverse=True):
            if batch and (
                len(batch) == self.batch_size
                or (not self.model.is_causal and len(ids) != len(batch[0]))
            ):
                yield batch
                batch = []
            batch.append(ids)
        if batch:
            yield batch

    @torch.no_grad()
    def _score(
        self, rows: list[tuple[tuple[int, ...], list[ScoredSpan]]]
    ) -> Iterator[tuple[ScoredSpan, list[float], list[bool]]]:
        """Yield the spans of some rows; of each of their targets the log-probability, and whether
        it is the likeliest."""
        width, device = max(len(ids) for ids, _ in rows), self.device
        padded = torch.zeros(len(rows), width, dtype=torch.int64)
        for row, (ids, _) in enumerate(rows):
            padded[row, : len(ids)] = torch.tensor(ids)
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(plain_batch(padded.to(device)))
        spans = [(row, span) for row, (_, spans) in enumerate(rows) for span in spans]
        positions = [
            (row, position)
            for row, span in spans
            for position in range(span.end - len(span.targets), span.end)
        ]
        at = torch.tensor(positions, device=device).T  # (2, n)
        # (n,)
        targets = torch.tensor(
            [token for _, span in spans for token in span.targets], device=device
        )
        logs, hits = _logs_of(output.readout, output.hidden[at[0], at[1]], targets)
        begin = 0
        for _, span in spans:
            end = begin + len(span.targets)
            yield span, logs[begin:end], hits[begin:end]
            begin = end


def _logs_of(readout: Readout, hidden: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
    """Return (log-probability, is the likeliest) of each target (n,) after hidden states (n, D)."""
    logs, hits = [], []
    step = max(1, SCORES_AT_ONCE // len(readout.table))
    for states, labels in zip(hidden.split(step), targets.split(step)):
        scores = full_scores(readout, states)  # (step, V)
        target_scores = scores.gather(1, labels[:, None])[:, 0]  # (step,)
        logs += (target_scores - scores.logsumexp(dim=1)).double().tolist()
        hits += (scores.argmax(dim=1) == labels).tolist()
    return logs, hits
