"""The memory head: what was read, compressed into summary tokens that later text is read behind.

In:    of one place a row, the hidden states of a document before it, and the 2n tokens from it on
Out:   mean -log p of these tokens' targets, read in two short rows behind summaries, and a weighted
       reconstruction loss
State: the compressor: `look` (K * 4, D), `say` (D, 4 D); `tell` (D, K D), which reconstructs

    document   [ A1            | A2 (n)      | B (n)      ]
    rows read  [ A1 ]  ->  [ s1; A2 ]  ->  [ s2; B ]           s: K vectors in the place of input
               embeddings

Specification 003, near-term 3: "learned rolling summary token & reconstruction loss". A2 sees A1
through s1 only, and B sees both through s2 only, which is computed from hidden states that saw s1:
so a summary is carried on, however long the text is (AutoCompressors, Chevalier et al. 2023, arXiv
2305.14788; recurrent memory, Bulatov et al. 2022, arXiv 2207.06881). The gradient reaches the
compressor and the model, which learns to read what it never saw. `ModelRunner` in
core/generation/engine.py uses it.

The reconstruction is of the bag of tokens summarised so far (what Compressive Transformers, arXiv
1911.05507, do with attention): it reaches s directly from the first step on, while the model cannot
yet read s, and needs no second decoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts import IGNORE_INDEX, Batch, LanguageModel, ModelOutput, plain_batch
from core.errors import UserError
from core.heads.head import Head
from core.heads.inputs import NOWHERE, HeadInputs, document_bounds, is_text, pick
from core.preset.settings import Settings
from core.schedules import Schedule

# B batch rows, T seq_length, D hidden_size, V vocab_size, K summary tokens, n tokens read behind
# them, L positions

VIEWS = 4
"""Weighted means of the hidden states that make one summary token: each looks for something
else."""


class Summary(NamedTuple):
    """A stand-in for text that is out of sight."""

    vectors: Tensor  # (B, K, D) input embeddings
    table: Tensor  # (V, D) the embedding table whose rows they stand in for


class MemorySettings(Settings):
    """The memory head's keys in `auxiliary`."""

    enable_memory: bool = False
    """Learn to compress what was read into summary tokens, and to read on behind them: for texts
    longer than model.seq_length."""
    memory_weight: Schedule = 0.2
    """Weight of the memory head's loss."""
    memory_tokens_after: int = Field(64, ge=1, le=1_000_000)
    """Tokens that are read behind a summary, twice in a row; model.seq_length must be more than
    twice as many."""
    memory_slots: int = Field(1, ge=1, le=1_000_000)
    """Summary tokens."""
    memory_reconstruction_weight: float = Field(0.1, ge=0.0)
    """Share of the reconstruction loss in the memory head's loss."""


class Memory(Head):
    weight_key = "memory_weight"

    @classmethod
    def check(cls, settings: Settings, seq_length: int, rows: int) -> None:
        assert isinstance(settings, MemorySettings)
        n, K = settings.memory_tokens_after, settings.memory_slots
        least = 1 + 2 * max(n, K)
        if least > seq_length:
            raise UserError(
                f"auxiliary.memory_tokens_after is {n} and memory_slots {K}: the memory head needs "
                f"rows of {least} tokens or more, and model.seq_length is {seq_length}. Make it "
                "longer, or those smaller."
            )

    def __init__(self, settings: MemorySettings, hidden_size: int, vocab_size: int):
        super().__init__()
        D = hidden_size
        self.slots, self.tokens_after = settings.memory_slots, settings.memory_tokens_after
        self.reconstruction_weight = settings.memory_reconstruction_weight
        # a softmax over positions would not notice one
        self.look = nn.Linear(D, self.slots * VIEWS, bias=False)
        self.say = nn.Linear(VIEWS * D, D)
        self.tell = nn.Linear(self.slots * D, D)

    # training -------------------------------------------------------------------------------------

    def choose(self, batch: Batch, draws: Tensor) -> Tensor:
        """(B, 3): where the document begins, where A2 begins and where B stops."""
        begin, stop = document_bounds(batch)
        # (B, T+1) targets left of a position
        known = F.pad((batch.labels != IGNORE_INDEX).long().cumsum(1), (1, 0))
        time = torch.arange(stop.shape[1], device=stop.device).expand(stop.shape)
        end = time + 2 * self.tokens_after
        ahead = known.gather(1, end.clamp(max=stop.shape[1])) - known[:, :-1]
        # (B, 1)
        middle = pick(is_text(batch) & (time > begin) & (end <= stop) & (ahead > 0), draws)[:, None]
        positions = torch.cat(
            [begin.gather(1, middle.clamp(min=0)), middle, middle + 2 * self.tokens_after], dim=1
        )
        return torch.where(middle == NOWHERE, NOWHERE, positions)

    def forward(self, inputs: HeadInputs, positions: Tensor, valid: Tensor) -> Tensor:
        hidden, labels, summaries = self._read_on(inputs, positions, valid)
        values, total = self._nats(inputs, hidden, labels)
        # the rows' values are without a graph; the total, which they share, has it
        values = values + (total - total.detach()) / valid.sum().clamp(min=1)
        return values + self.reconstruction_weight * self._reconstruction(
            inputs, positions, summaries
        )

    @torch.no_grad()
    def measure(self, inputs: HeadInputs, positions: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """In nats per token of A2 and B. `gain`: what the summary saves, against reading A2, and B,
        with nothing before them. `gap`: what it loses, against the row as it is, where all of the
        document is seen. `reconstruction`: per token before."""
        hidden, labels, summaries = self._read_on(inputs, positions, valid)
        each = self._positions(inputs, positions)
        ids = inputs.batch.input_ids.gather(1, each)
        with self._as_the_model_computes(inputs):
            cropped = read(inputs.model, ids.view(-1, self.tokens_after)).hidden  # (2 B, n, D)
        (within, _), (without, _) = (
            self._nats(inputs, states, labels) for states in (hidden, cropped.view_as(hidden))
        )
        known = labels != IGNORE_INDEX
        full = torch.where(known, inputs.nll(each), 0.0).sum(1) / (2 * self.tokens_after)
        # of means over all 2n to means over targets
        share = 2 * self.tokens_after / known.sum(1).clamp(min=1)
        results = {"gain": (without - within) * share, "gap": (within - full) * share}
        return results | {"reconstruction": self._reconstruction(inputs, positions, summaries)}

    def _read_on(
        self, inputs: HeadInputs, positions: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Compute for A2 and B: hidden states (B, 2n, D) and labels (B, 2n); and the summaries
        before them, (B, K, D) each."""
        assert inputs.model is not None
        n, table = self.tokens_after, inputs.readout.table
        begin, middle, _ = positions[:, :, None].unbind(1)  # (B, 1) each
        time, at = (
            torch.arange(inputs.hidden.shape[1], device=positions.device),
            self._positions(inputs, positions),
        )
        ids = inputs.batch.input_ids.gather(1, at)
        labels = torch.where(valid[:, None], inputs.batch.labels.gather(1, at), IGNORE_INDEX)
        first = self.summarise(inputs.hidden, (time >= begin) & (time < middle))
        with self._as_the_model_computes(inputs):
            behind_one = read(
                inputs.model, ids[:, :n], Summary(first, table)
            ).hidden  # (B, K + n, D)
            second = self.summarise(behind_one)
            behind_two = read(inputs.model, ids[:, n:], Summary(second, table)).hidden
        hidden = torch.cat([states[:, self.slots :] for states in (behind_one, behind_two)], dim=1)
        return hidden, labels, [first, second]

    def _positions(self, inputs: HeadInputs, positions: Tensor) -> Tensor:
        """Return the positions of A2 and B in their row: (B, 2n)."""
        at = positions[:, 1:2] + torch.arange(2 * self.tokens_after, device=positions.device)
        return at.clamp(max=inputs.hidden.shape[1] - 1)  # only rows without a place would go beyond

    def _nats(self, inputs: HeadInputs, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of -log p over a row's targets / 2n: (B,) without a graph; and the sum over rows,
        () with one."""
        assert inputs.cross_entropy is not None
        with self._as_the_model_computes(inputs):
            total, values = inputs.cross_entropy(hidden, labels)
        return values.sum(1) / labels.shape[1], total / labels.shape[1]

    def _reconstruction(
        self, inputs: HeadInputs, positions: Tensor, summaries: list[Tensor]
    ) -> Tensor:
        """Mean -log p of the tokens before A2 as told by s1 alone, and before B by s2 alone: their
        mean, (B,).

        The table gets no gradient: telling tokens apart is the compressor's business, not the
        embeddings'."""
        begin, middle, _ = positions[:, :, None].unbind(1)
        time = torch.arange(inputs.hidden.shape[1], device=positions.device)
        found = []
        for vectors, stop in zip(summaries, (middle, middle + self.tokens_after)):
            inside = (time >= begin) & (time < stop)  # (B, T)
            # (B, V)
            scores = self.tell(vectors.flatten(1)) @ inputs.wide(inputs.readout.table.detach()).T
            nll = -scores.log_softmax(-1).gather(1, inputs.batch.input_ids)  # (B, T)
            found.append(torch.where(inside, nll, 0.0).sum(1) / inside.sum(1).clamp(min=1))
        return torch.stack(found).mean(0)

    @contextmanager
    def _as_the_model_computes(self, inputs: HeadInputs) -> Iterator[None]:
        """Under the autocast of the pass, if there was one; and without drawing from the random
        numbers of those to come."""
        device = inputs.hidden.device
        low = inputs.dtype in (torch.bfloat16, torch.float16)
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, inputs.dtype, enabled=low),
        ):
            yield

    # use ------------------------------------------------------------------------------------------

    def summarise(self, hidden: Tensor, where: Tensor | None = None) -> Tensor:
        """The summary tokens of hidden states (B, L, D), or of those that `where` (B, L) marks: (B,
        K, D), in fp32 or wider."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            scores = self.look(hidden)  # (B, L, K * VIEWS)
            if where is not None:  # not -inf: a row may have nothing to look at
                scores = scores.masked_fill(~where[:, :, None], torch.finfo(scores.dtype).min)
            views = scores.softmax(1).transpose(1, 2) @ hidden  # (B, K * VIEWS, D)
            return self.say(views.unflatten(1, (self.slots, VIEWS)).flatten(2))

    def compress(self, model: LanguageModel, input_ids: Tensor, before: Summary | None) -> Summary:
        """The summary of tokens (B, t), and of what `before` stands for."""
        output = read(model, input_ids, before)
        return Summary(self.summarise(output.hidden), output.readout.table)


def read(
    model: Any, input_ids: Tensor, summary: Summary | None = None, cache: Any = None
) -> ModelOutput:
    """Compute what a model makes of K summary tokens and the tokens (B, t) behind them: hidden (B,
    K + t, D). A cache is extended.

    Never compiled: a compiled model would not notice the summary. What the model reports stays that
    of the pass before."""
    attributes = dict(vars(model))
    try:
        if summary is None:
            return (
                model.forward(plain_batch(input_ids))
                if cache is None
                else model.extend(input_ids, cache)
            )
        # any token: its embedding is replaced
        rows = F.pad(input_ids, (summary.vectors.shape[1], 0))
        with _in_front(model, summary):
            return model.forward(plain_batch(rows)) if cache is None else model.extend(rows, cache)
    finally:
        vars(model).update(attributes)


@contextmanager
def _in_front(model: nn.Module, summary: Summary) -> Iterator[None]:
    """While it lasts, a summary stands for the input embeddings of the first K positions."""
    K = summary.vectors.shape[1]

    def put(_: nn.Module, __: Any, embeddings: Tensor) -> Tensor:
        return torch.cat([summary.vectors.to(embeddings.dtype), embeddings[:, K:]], dim=1)

    embedding = next(
        m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is summary.table
    )
    handle = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()
