"""A curriculum by difficulty: chooses the rows to train among those that are read for a step
(specification 003, near term 5).

In:    the rows of a step over all ranks, `candidates` times as many as are trained; the model as it
       is
Out:   the rows of this rank that are trained, with the counts of the whole step; how they were
       chosen, for the log
State: none; draws follow from the seed, the step and the row

    candidates ──► loss of each ──► percentiles of all: buckets, easiest first ──► one of each
    group, by its bucket's weight

As in Selective-Backprop (Jiang et al. 2019, arXiv 1910.00762) the loss is the model's own, and the
chance follows from its percentile among others; here by a table of weights, each a schedule, so
that a run may go from easy to hard or the other way.

A group is the rows k, k + R, k + 2R ... of a step that trains R rows. The number of ranks divides R
and the number of lanes, so that all of a group belong to one rank, and any number of ranks trains
the same rows."""

import time
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from core.contracts import Batch, LanguageModel
from core.data.loader import StepRows
from core.errors import UserError
from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
from core.losses.stack import LossStack
from core.preset.settings import MASKED_TOKENS
from core.preset.train import TrainSettings
from core.randomness import derive_seed, uniform
from core.runtime import uncompiled
from core.schedules import value_at
from core.training.machine import Machine

# c candidates of a group, R groups of a step (rows that are trained, over all ranks), n rows of
# this rank


def buckets_of(losses: np.ndarray, learned: np.ndarray, count: int) -> np.ndarray:
    """Return the bucket of each row, by the percentile of its loss among the rows that are learned:
    0 for the easiest, `count` - 1 for the hardest.

    losses, learned: (c, R), any loss where `learned` is False. The sizes of buckets differ by one
    row at most. Among equal losses the earlier row comes first, so that there is one answer; a loss
    that is not a number comes last."""
    order = np.argsort(np.where(learned, losses, np.inf), axis=None, kind="stable")
    order = order[learned.ravel()[order]]
    buckets = np.zeros(losses.size, dtype=np.int64)
    buckets[order] = np.arange(len(order)) * count // max(len(order), 1)
    return buckets.reshape(losses.shape)


def choose(
    buckets: np.ndarray, learned: np.ndarray, weights: list[float], draws: np.ndarray
) -> np.ndarray:
    """Choose the candidate of each group that is trained: (R,) in [0, c). Chances are proportional
    to the weights of the candidates' buckets.

    buckets, learned: (c, R); draws: (R,) in [0, 1). A row without targets is only taken where its
    whole group has none. Where all of a group weigh nothing, each has an equal chance.
    """
    chances = np.where(learned, np.asarray(weights)[buckets], 0.0)
    chances = np.where(chances.sum(0) > 0, chances, learned)
    chances = np.where(chances.sum(0) > 0, chances, 1.0)
    cumulative = chances.cumsum(0)
    return (cumulative > draws * cumulative[-1]).argmax(0)


class Curriculum:
    """Scores a step's rows with the model and keeps one of each group. Ranks agree in one
    exchange."""

    def __init__(self, train: TrainSettings, num_sources: int, machine: Machine):
        assert train.curriculum is not None
        self._settings, self._seed, self._num_sources = train.curriculum, train.seed, num_sources
        self._parallel, self._device, self._dtype = machine.parallel, machine.device, machine.dtype
        # difficulty, whatever the run's losses are
        self._stack = LossStack([CrossEntropy(CrossEntropySettings())])
        self.note = (
            f"curriculum: of {train.candidates} rows that are read one is trained; the loss that "
            "is told is of those"
        )

    def choose(
        self,
        model: LanguageModel,
        rows: StepRows,
        micro_batches: Iterable[Batch],
        progress: float,
        step: int,
    ) -> StepRows:
        """Choose what is trained of `rows`. Every rank must call it. Training itself is not
        changed: neither random draws, nor the model's mode, nor gradients.

        micro_batches   `rows.batch` on the device, in pieces that fit it
        """
        started = time.monotonic()
        weights = [value_at(weight, progress) for weight in self._settings.bucket_weights]
        table = self._table(rows, self._losses(model, micro_batches))
        learned = table[:, :, 1] > 0  # (c, R)
        losses = table[:, :, 0] / np.maximum(table[:, :, 1], 1)
        buckets = buckets_of(losses, learned, len(weights))
        seed, groups = derive_seed(self._seed, "curriculum", step), range(table.shape[1])
        draws = np.array([uniform(seed, group) for group in groups])
        taken = choose(buckets, learned, weights, draws)
        is_taken = np.zeros(learned.shape, dtype=bool)
        is_taken[taken, groups] = True
        kept = [i for i, number in enumerate(rows.numbers) if is_taken.ravel()[number]]
        num_targets, *source_tokens = table[is_taken][:, 1:].sum(0).astype(int).tolist()
        trained = is_taken & learned
        by_bucket = np.bincount(buckets[trained], minlength=len(weights)) / trained.sum()
        fields = {
            "loss": losses[trained].mean(),
            "candidates_loss": losses[learned].mean(),
            "buckets": by_bucket.tolist(),
            "weights": weights,
            "passed_over_tokens": rows.num_tokens - sum(source_tokens),
            "seconds": time.monotonic() - started,
        }
        return replace(
            rows,
            batch=rows.batch.take(kept),
            numbers=[rows.numbers[i] for i in kept],
            num_targets=num_targets,
            num_tokens=sum(source_tokens),
            source_tokens=source_tokens,
            log_fields={"curriculum": fields},
        )

    def _table(self, rows: StepRows, losses: torch.Tensor) -> np.ndarray:
        """Gather the numbers of all ranks' candidates, (c, R, 2 + sources): sum of losses; targets;
        tokens of each source."""
        targets = (rows.batch.labels >= 0).sum(1)
        tokens = [(rows.batch.source_ids == source).sum(1) for source in range(self._num_sources)]
        local = torch.stack([losses, targets, *tokens], dim=1).numpy()  # (n, 2 + sources) float64
        by_rank = self._parallel.gather((rows.numbers, local))
        table = np.empty((sum(len(numbers) for numbers, _ in by_rank), local.shape[1]))
        for numbers, part in by_rank:
            table[numbers] = part
        return table.reshape(self._settings.candidates, -1, local.shape[1])

    @torch.no_grad()
    def _losses(self, model: LanguageModel, micro_batches: Iterable[Batch]) -> torch.Tensor:
        """Sum the cross-entropy over the targets of each row, as an evaluation would measure it:
        (n,) on the CPU."""
        was_training = model.training
        model.eval()
        losses = []
        low = self._dtype != torch.float32
        autocast = torch.autocast(self._device.type, dtype=self._dtype, enabled=low)
        with uncompiled(self._device), autocast:
            for batch in micro_batches:
                _, terms = self._stack(model(batch), batch, 1, 0.0, self._num_sources)
                losses.append(terms.values.double().sum(1))
        model.train(was_training)
        return torch.cat(losses).cpu()


def build_curriculum(
    train: TrainSettings, objective: str, num_sources: int, machine: Machine
) -> Curriculum | None:
    """Build the preset's curriculum, if it has one. Raises UserError where a row's loss would not
    say how difficult the row is."""
    if train.curriculum is None:
        return None
    if objective == MASKED_TOKENS:
        raise UserError(
            "train.curriculum chooses rows by their loss, but this model predicts masked tokens: "
            "a row's loss follows from which of its tokens happen to be hidden. Leave the section "
            "out, or take another model."
        )
    return Curriculum(train, num_sources, machine)
