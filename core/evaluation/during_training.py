"""The tasks that an evaluation in training runs: BLiMP, on every rank's share of its paradigms.

In:    `train.eval_tasks`, a model, its tokenizer
Out:   {metric: value}, the same on every rank
State: the pairs, read before training starts
"""

from collections.abc import Callable
from pathlib import Path

from core.contracts import LanguageModel
from core.data.tokenizer import Tokenizer
from core.data.worker import Stopped
from core.errors import UserError
from core.evaluation.blimp import Pairs, load_pairs, mean_accuracy, score_pairs
from core.evaluation.harness.scoring import Scorer
from core.parallel.ranks import on_all_ranks, rank_zero_first
from core.preset.base import PresetBase
from core.preset.settings import NEXT_TOKEN, objective_of
from core.training.machine import Machine

RunTasks = Callable[[LanguageModel], dict[str, float]]


def build_tasks(
    preset: PresetBase,
    machine: Machine,
    tokenizer: Tokenizer,
    root: Path,
    between: Callable[[int, int], None],
) -> RunTasks:
    """Return what runs the preset's tasks; every rank must call it. Raises UserError where the
    model or the data do not give them.

    between   called between batches; may raise Stopped
    """
    train = preset.train
    if not train.eval_tasks:
        return lambda model: {}
    if objective_of(preset.model) != NEXT_TOKEN:
        raise UserError(
            f"train.eval_tasks: a {preset.model.type} fills in masked tokens, and blimp compares "
            "probabilities of next tokens; leave eval_tasks out"
        )
    parallel = machine.parallel
    pairs = rank_zero_first(
        parallel, lambda: load_pairs(train.blimp_path, root, train.eval_task_limit)
    )
    own = dict(list(pairs.items())[parallel.rank :: parallel.world_size])

    def run(model: LanguageModel) -> dict[str, float]:
        context, rows = preset.model.seq_length, train.per_gpu_batch_size
        scorer = Scorer(model, context, rows, machine.dtype)
        return {"blimp_accuracy": _accuracy(own, scorer, tokenizer, machine, between)}

    return run


def _accuracy(
    own: Pairs,
    scorer: Scorer,
    tokenizer: Tokenizer,
    machine: Machine,
    between: Callable[[int, int], None],
) -> float:
    """Score this rank's paradigms, and return the mean over those of all ranks. An error of one is
    raised on all."""
    parallel, model = machine.parallel, scorer.model
    was_training = model.training
    model.eval()
    try:
        found = on_all_ranks(
            parallel, lambda: score_pairs(own, scorer, tokenizer, between), Stopped
        )
    finally:
        model.train(was_training)
    return mean_accuracy({k: v for part in parallel.gather(found) for k, v in part.items()})
