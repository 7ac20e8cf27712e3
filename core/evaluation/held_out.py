"""Quality on held-out documents: cross-entropy, perplexity, bits per byte, token accuracy,
sharpness and calibration of the predictions, and collapse of the embedding table. For a model that
predicts masked tokens also pseudo-perplexity (Salazar et al. 2020, arXiv 1910.14659), the original
decoder as a baseline, and the geometry of the prototypes.

In:    a model, the loss stack, held-out rows (made when first asked for)
Out:   a dict of numbers, the same on every rank and for any batch size (but where a head compares
       the rows of a batch)
State: the rows
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from core.contracts import Batch, LanguageModel, ModelOutput, Readout, call_if_defined
from core.data.packing import Row
from core.data.reader import collate
from core.data.worker import Stopped
from core.heads.stack import HeadStack
from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
from core.losses.stack import LossStack
from core.models.embedding_geometry import geometry, mean_pairwise_cosine
from core.parallel.ranks import on_all_ranks
from core.preset.settings import MASKED_TOKENS, NEXT_TOKEN
from core.training.machine import Machine

PSEUDO = {
    "cross_entropy": "pseudo_perplexity",
    "nll_h12": "pseudo_perplexity_h12",
    "nll_h4": "pseudo_perplexity_h4",
    "decoder_cross_entropy": "decoder_pseudo_perplexity",
}
"""Pseudo-perplexity is the exponential of these means, each position hidden alone."""
OF_DECODER = {
    "cross_entropy": "decoder_cross_entropy",
    "token_accuracy": "decoder_accuracy",
    "top5_accuracy": "decoder_top5_accuracy",
}
"""The metrics of a model's second readout, which nobody trains."""
Sums = dict[str, float]
"""Sums over targets by name; "count" is the number of targets."""


@dataclass(frozen=True)
class HeldOut:
    """The rows that are measured.

    make_rows   returns the rows, each with the bytes of its text: bits per byte can be compared
                between tokenizers, loss per token cannot; called once, at the first evaluation
    sources     names, by the rows' numbers: where there are several, the first loss is given for
                each
    hide_one    for a model that predicts masked tokens: makes of these rows others, in each of
                which one token is hidden
    """

    make_rows: Callable[[], list[Row]]
    sources: Sequence[str] = ()
    hide_one: Callable[[list[Row]], list[Row]] | None = None


@dataclass
class _Local:
    """The sums that one rank has measured."""

    sums: Sums = field(default_factory=dict)
    singles: Sums = field(default_factory=dict)  # over the rows in which one token is hidden
    heads: dict[str, Tensor] = field(default_factory=dict)  # (2,) each: sum and number of rows
    tables: dict[str, float] = field(default_factory=dict)  # empty where a rank has no rows


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

    def run(
        self,
        model: LanguageModel,
        progress: float,
        on_batch: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, Any] | None:
        """Return the numbers of an `eval` event; None when nothing is held out. Every rank must
        call it; an error of one is raised on all.

        on_batch   called with how many of how many batches are done; may raise, to stop
        """
        was_training = model.training
        try:
            local = on_all_ranks(
                self._parallel, lambda: self._measure_rows(model, progress, on_batch), Stopped
            )
        finally:
            model.train(was_training)
        means, count = self._means(local.sums)
        heads = self._means_of_heads(local.heads)
        if not count:
            return None
        sources = self._losses_by_source(means)
        losses = {loss.name: means.pop(f"losses/{loss.name}") for loss in self._stack.losses}
        numbers = self._of_cross_entropy(means, count)
        hidden_alone, _ = self._means(local.singles)
        numbers |= {
            PSEUDO[name]: _perplexity(value)
            for name, value in hidden_alone.items()
            if name in PSEUDO
        }
        return {
            **numbers,
            **means,
            **next(tables for tables in self._parallel.gather(local.tables) if tables),
            "losses": losses,
            **({"sources": sources} if sources else {}),
            **({"heads": heads} if heads else {}),
            "causal": model.is_causal,
            "objective": MASKED_TOKENS if self._hide_one else NEXT_TOKEN,
            "eval_tokens": int(count),
        }

    def _losses_by_source(self, means: dict[str, float]) -> dict[str, dict[str, float]]:
        """Take the sources' sums out of `means`; returns the loss of each source that has
        targets."""
        losses = {}
        for i, name in enumerate(self._sources):
            total, share = means.pop(f"sources/{i}", 0.0), means.pop(f"targets/{i}", 0.0)
            if share:
                losses[name] = {"loss": total / share}
        return losses

    def _of_cross_entropy(self, means: dict[str, float], count: float) -> dict[str, Any]:
        """Take the cross-entropy out of `means`, where it is; returns it with what follows from
        it."""
        if "cross_entropy" not in means:
            return {}
        cross_entropy = means.pop("cross_entropy")
        if self._hide_one is not None:
            return {"cross_entropy": cross_entropy}
        bits = cross_entropy * count / math.log(2)
        return {
            "cross_entropy": cross_entropy,
            # of the token-weighted mean: never a mean of exponentials
            "perplexity": _perplexity(cross_entropy),
            "bits_per_byte": bits / self._num_bytes if self._num_bytes else None,
        }

    def _measure_rows(
        self, model: LanguageModel, progress: float, on_batch: Callable[[int, int], None]
    ) -> _Local:
        """Measure this rank's rows."""
        batches = self._made_batches()
        total, local = len(batches) + len(self._singles), _Local()
        model.eval()
        readout = None
        for done, batch in enumerate(batches, 1):
            readout = self._measure(model, batch, progress, local.sums, local.heads)
            on_batch(done, total)
        if readout is not None:
            local.tables = _of_tables(readout)
        for done, batch in enumerate(self._singles, len(batches) + 1):
            self._measure(model, batch, progress, local.singles, local.heads)
            on_batch(done, total)
        return local

    def _made_batches(self) -> list[Batch]:
        """Make this rank's batches, the first time; those in which one token is hidden beside
        them."""
        if self._batches is None:
            rows = self._make_rows()
            self._num_bytes = sum(row.num_bytes for row in rows)
            batches = enumerate(self._share(rows, self._batch_rows))
            positioned = [self._with_positions(batch, i) for i, batch in batches]
            # shorter: as many tokens at once as in the others
            if self._hide_one and (singles := self._hide_one(rows)):
                longer = len(rows[0].input_ids) // len(singles[0].input_ids)
                self._singles = self._share(singles, self._batch_rows * max(1, longer))
            self._batches = positioned
        return self._batches

    def _share(self, rows: list[Row], at_once: int) -> list[Batch]:
        """Collate this rank's share of the rows."""
        own = rows[self._parallel.rank :: self._parallel.world_size]
        return [collate(own[i : i + at_once], packed=True) for i in range(0, len(own), at_once)]

    def _with_positions(self, batch: Batch, number: int) -> Batch:
        """Choose where heads look in this rank's batch of that number: the same for any number of
        ranks."""
        if self._heads is None:
            return batch
        first = number * self._batch_rows
        rows = [
            self._parallel.rank + self._parallel.world_size * (first + i)
            for i in range(len(batch.labels))
        ]
        return self._heads.choose(batch, self._seed, 0, rows)

    def _means_of_heads(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Average over the rows of all ranks in which a head has a position."""
        by_rank = self._parallel.gather({name: pair.tolist() for name, pair in sums.items()})
        means = {}
        for name in dict.fromkeys(name for pairs in by_rank for name in pairs):
            pairs = [each[name] for each in by_rank if name in each]
            total, count = (sum(column) for column in zip(*pairs))
            if count:
                means[name] = total / count
        return means

    def _means(self, sums: Sums) -> tuple[dict[str, float], float]:
        """Add up over all ranks; returns the means over targets, and the number of targets."""
        by_rank = self._parallel.gather(sums)
        names = dict.fromkeys(name for sums in by_rank for name in sums)
        totals = {name: sum(sums.get(name, 0.0) for sums in by_rank) for name in names}
        count = totals.pop("count", 0.0)
        return {name: value / count for name, value in totals.items()} if count else {}, count

    @torch.no_grad()
    def _measure(
        self,
        model: LanguageModel,
        batch: Batch,
        progress: float,
        totals: Sums,
        of_heads: dict[str, Tensor],
    ) -> Readout:
        """Add the sums over one batch to `totals` and `of_heads`; returns the readout."""
        moved = batch.to(self._device)
        num_sources = max(len(self._sources), 1 + int(batch.source_ids.max()))
        low = self._dtype != torch.float32
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=low):
            output = model(moved)
            measures = self._stack.measure(output, moved, progress, num_sources)
            sums = {"count": measures.terms.count, **measures.token_stats}
            if self._heads is not None:
                nll = partial(self._stack.nll_at, output, moved, measures.terms)
                cross_entropy = partial(self._stack.cross_entropy, output.readout)
                inputs = self._heads.inputs(model, output, moved, nll, cross_entropy)
                for name, pair in self._heads.measure(inputs).items():
                    of_heads[name] = pair.double() + of_heads.get(name, 0.0)
            if (decoder := call_if_defined(model, "baseline_readout")) is not None:
                stats = self._baseline.measure(
                    ModelOutput(output.hidden, decoder), moved, progress, num_sources
                ).token_stats
                sums |= {key: stats[name] for name, key in OF_DECODER.items()}
        sums |= {f"losses/{name}": value for name, value in measures.terms.sums.items()}
        for i in range(len(self._sources)):
            sums |= {
                f"sources/{i}": measures.terms.source_sums[i],
                f"targets/{i}": measures.terms.source_counts[i],
            }
        numbers = torch.stack([value.double() for value in sums.values()]).tolist()
        for name, number in zip(sums, numbers):
            totals[name] = totals.get(name, 0.0) + number
        return output.readout


def _of_tables(readout: Readout) -> dict[str, float]:
    """Measure how the rows of the embedding table, and the prototypes, lie to each other."""
    numbers = {"table_cosine": mean_pairwise_cosine(readout.table)}
    if readout.provides == "distances" and readout.linear is not None:
        numbers |= geometry(readout.linear[0], readout.table)
    return numbers


def _perplexity(nats: float) -> float | None:
    """Return the exponential; None beyond what a float holds."""
    return math.exp(nats) if nats < 709.0 else None
