"""Quality on held-out documents: cross-entropy, perplexity, bits per byte, token accuracy, how
sharp and how well aimed the predictions are, and whether the embedding table collapses. Of a model
that predicts masked tokens also pseudo-perplexity (Salazar et al. 2020, arXiv 1910.14659), the
original decoder as a baseline, and how prototypes lie.

In:    a model, the loss stack, held-out rows (made when first asked for)
Out:   a dict of numbers, the same on every rank and for any batch size (but where a head compares
       the rows of a batch)
State: the rows
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from core.contracts import Batch, LanguageModel, ModelOutput, Readout, call_if_defined
from core.data.packing import Row
from core.data.reader import collate
from core.data.worker import Stopped
from core.errors import first_line
from core.heads.stack import HeadStack
from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
from core.losses.stack import LossStack
from core.models.embedding_geometry import geometry, mean_pairwise_cosine
from core.preset.settings import MASKED_TOKENS, NEXT_TOKEN
from core.training.machine import Machine

PSEUDO = {
    "cross_entropy": "pseudo_perplexity",
    "nll_h12": "pseudo_perplexity_h12",
    "nll_h4": "pseudo_perplexity_h4",
    "decoder_cross_entropy": "decoder_pseudo_perplexity",
}
"""Pseudo-perplexity is the exponential of these, each position hidden alone."""
OF_DECODER = {
    "cross_entropy": "decoder_cross_entropy",
    "token_accuracy": "decoder_accuracy",
    "top5_accuracy": "decoder_top5_accuracy",
}
"""What is told of a model's second readout, which nobody trains."""


@dataclass(frozen=True)
class HeldOut:
    """The rows that are measured.

    make_rows   -> held-out rows, each with the bytes of text in it: bits per byte can be compared
                between tokenizers, loss per token cannot; called once, at the first evaluation
    sources     names, by the rows' numbers: where there are several, the first loss is given for
                each
    hide_one    of a model that predicts masked tokens: those rows -> rows in each of which one
                token is hidden
    """

    make_rows: Callable[[], list[Row]]
    sources: Sequence[str] = ()
    hide_one: Callable[[list[Row]], list[Row]] | None = None


class Evaluator:
    """Evaluates a model on the same rows each time.

    heads   also measured, at positions that follow from `seed`
    """

    def __init__(
        self,
        machine: Machine,
        held_out: HeldOut,
        stack: LossStack,
        batch_rows: int,
        heads: HeadStack | None = None,
        seed: int = 0,
    ):
        self._hide_one, self._heads, self._seed = held_out.hide_one, heads, seed
        self._sources = held_out.sources if len(held_out.sources) > 1 else ()
        self._make_rows, self._stack, self._batch_rows = held_out.make_rows, stack, batch_rows
        self._num_bytes = 0
        self._parallel, self._device, self._dtype = machine.parallel, machine.device, machine.dtype
        self._baseline = LossStack([CrossEntropy(CrossEntropySettings())])
        self._batches: list[Batch] | None = None
        self._singles: list[Batch] = []
        self._of_heads: dict[str, Tensor] = {}  # (2,) each: sum and number of rows

    def run(
        self,
        model: LanguageModel,
        progress: float,
        told: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, Any] | None:
        """The numbers of an `eval` event; None when nothing is held out. Every rank must call it;
        what fails on one fails on all.

        told   called with how many of how many batches are done; may raise, to stop
        """
        was_training, failure = model.training, None  # type: ignore[attr-defined]
        try:
            sums, singles, of_tables = self._of_own_rows(model, progress, told)
        except Exception as error:  # raised once no other rank waits for this one
            failure = error
        finally:
            model.train(was_training)  # type: ignore[attr-defined]
        told_by_all = self._parallel.gather(
            None if failure is None else (isinstance(failure, Stopped), first_line(failure))
        )
        if failures := [each for each in told_by_all if each is not None]:
            stopped, line = max(failures)
            raise Stopped if stopped else failure or RuntimeError(f"on another process: {line}")
        means, count = self._means(sums)
        of_heads = self._means_of_heads()
        if not count:
            return None
        of_sources = {}
        for i, name in enumerate(self._sources):
            total, share = means.pop(f"sources/{i}", 0.0), means.pop(f"targets/{i}", 0.0)
            of_sources |= {name: {"loss": total / share}} if share else {}
        of_losses = {loss.name: means.pop(f"losses/{loss.name}") for loss in self._stack.losses}
        numbers: dict[str, Any] = {}
        if "cross_entropy" in means:
            numbers["cross_entropy"] = cross_entropy = means.pop("cross_entropy")
            if self._hide_one is None:
                # the token-weighted mean; perplexity is its exponential, never a mean of
                # exponentials
                numbers["perplexity"] = _perplexity(cross_entropy)
                bits = cross_entropy * count / math.log(2)
                numbers["bits_per_byte"] = bits / self._num_bytes if self._num_bytes else None
        alone, _ = self._means(singles)
        numbers |= {
            PSEUDO[name]: _perplexity(value) for name, value in alone.items() if name in PSEUDO
        }
        return {
            **numbers,
            **means,
            # a rank may have had no rows
            **next(found for found in self._parallel.gather(of_tables) if found),
            "losses": of_losses,
            **({"sources": of_sources} if of_sources else {}),
            **({"heads": of_heads} if of_heads else {}),
            "causal": model.is_causal,
            "objective": MASKED_TOKENS if self._hide_one else NEXT_TOKEN,
            "eval_tokens": int(count),
        }

    def _of_own_rows(
        self, model: LanguageModel, progress: float, told: Callable[[int, int], None]
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """Sums over this rank's rows, those over the rows in each of which one token is hidden, and
        what the tables are like."""
        if self._batches is None:
            rows = self._make_rows()
            self._num_bytes = sum(row.num_bytes for row in rows)
            batches = [
                self._with_positions(batch, i)
                for i, batch in enumerate(self._share(rows, self._batch_rows))
            ]
            # shorter: as many tokens at once as in the others
            if self._hide_one and (singles := self._hide_one(rows)):
                longer = len(rows[0].input_ids) // len(singles[0].input_ids)
                self._singles = self._share(singles, self._batch_rows * max(1, longer))
            self._batches = batches
        total = len(self._batches) + len(self._singles)
        model.eval()  # type: ignore[attr-defined]
        self._of_heads = {}
        sums, readout = self._sums(model, self._batches, progress, lambda done: told(done, total))
        singles, _ = self._sums(
            model,
            self._singles,
            progress,
            lambda done: told(len(self._batches or []) + done, total),
        )
        return sums, singles, {} if readout is None else _of_tables(readout)

    def _share(self, rows: list[Row], at_once: int) -> list[Batch]:
        """This rank's."""
        own = rows[self._parallel.rank :: self._parallel.world_size]
        return [collate(own[i : i + at_once], packed=True) for i in range(0, len(own), at_once)]

    def _with_positions(self, batch: Batch, number: int) -> Batch:
        """Of this rank's batch of that number, with where heads look: the same for any number of
        ranks."""
        if self._heads is None:
            return batch
        first = number * self._batch_rows
        rows = [
            self._parallel.rank + self._parallel.world_size * (first + i)
            for i in range(len(batch.labels))
        ]
        return self._heads.choose(batch, self._seed, 0, rows)

    def _means_of_heads(self) -> dict[str, float]:
        """Over the rows of all ranks in which a head has a place."""
        everyones = self._parallel.gather(
            {name: found.tolist() for name, found in self._of_heads.items()}
        )
        names = dict.fromkeys(name for sums in everyones for name in sums)
        totals = {
            name: [sum(column) for column in zip(*(s[name] for s in everyones if name in s))]
            for name in names
        }
        return {name: total / count for name, (total, count) in totals.items() if count}

    def _sums(
        self,
        model: LanguageModel,
        batches: list[Batch],
        progress: float,
        told: Callable[[int], None],
    ) -> tuple[dict[str, float], Readout | None]:
        sums: dict[str, float] = {}
        readout = None
        for done, batch in enumerate(batches, 1):
            found, readout = self._measure(model, batch, progress)
            sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
            told(done)
        return sums, readout

    def _means(self, sums: dict[str, float]) -> tuple[dict[str, float], float]:
        """Over all ranks: per target; the number of targets."""
        everyones = self._parallel.gather(sums)
        names = dict.fromkeys(name for sums in everyones for name in sums)
        totals = {name: sum(sums.get(name, 0.0) for sums in everyones) for name in names}
        count = totals.pop("count", 0.0)
        return {name: value / count for name, value in totals.items()} if count else {}, count

    @torch.no_grad()
    def _measure(
        self, model: LanguageModel, batch: Batch, progress: float
    ) -> tuple[dict[str, float], Readout]:
        """Sums over the targets of one batch; the readout."""
        moved = batch.to(self._device)
        num_sources = max(len(self._sources), 1 + int(batch.source_ids.max()))
        with torch.autocast(
            self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32
        ):
            output = model(moved)
            measures = self._stack.measure(output, moved, progress, num_sources)
            sums = {"count": measures.terms.count, **measures.facts}
            if self._heads is not None:
                nll = partial(self._stack.nll_at, output, moved, measures.terms)
                cross_entropy = partial(self._stack.cross_entropy, output.readout)
                inputs = self._heads.inputs(model, output, moved, nll, cross_entropy)
                for name, found in self._heads.measure(inputs).items():
                    self._of_heads[name] = found.double() + self._of_heads.get(name, 0.0)
            if (decoder := call_if_defined(model, "baseline_readout")) is not None:
                facts = self._baseline.measure(
                    ModelOutput(output.hidden, decoder), moved, progress, num_sources
                ).facts
                sums |= {told: facts[name] for name, told in OF_DECODER.items()}
        sums |= {f"losses/{name}": value for name, value in measures.terms.sums.items()}
        for i in range(len(self._sources)):
            sums |= {
                f"sources/{i}": measures.terms.source_sums[i],
                f"targets/{i}": measures.terms.source_counts[i],
            }
        numbers = torch.stack([value.double() for value in sums.values()]).tolist()
        return dict(zip(sums, numbers)), output.readout


def _of_tables(readout: Readout) -> dict[str, float]:
    found = {"table_cosine": mean_pairwise_cosine(readout.table)}
    if readout.provides == "distances" and readout.linear is not None:
        found |= geometry(readout.linear[0], readout.table)
    return found


def _perplexity(nats: float) -> float | None:
    """None beyond what a float holds."""
    return math.exp(nats) if nats < 709.0 else None
