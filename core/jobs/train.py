"""The `train` job: assemble, tell what is about to happen, train run after run, leave the files of
a run.

In:    a preset, the runtime, the ranks
Out:   checkpoints/<lineage>_*.pth and logs/<lineage>/
State: none
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from core.assembly.session import TrainingSession, build_training
from core.checkpoint.lineage import owned
from core.errors import Interrupted
from core.parallel.ranks import on_rank_zero
from core.reports.curves_masked import MaskedPlot
from core.reports.run_card import LossPlot, RunCard
from core.runtime import Runtime
from core.signals import StopRequest
from core.training.progress import begin_next_run
from core.ui.dashboard import view_for


def train(
    preset: Any, runtime: Runtime, parallel: Any, root: Path, started: float, console: Any
) -> None:
    """Train to the end of the preset's runs. Raises Interrupted after Ctrl-C, SIGTERM or SIGHUP,
    with everything saved."""
    with ExitStack() as held, StopRequest() as stop:
        on_rank_zero(parallel, lambda: held.enter_context(owned(root, preset.lineage, preset.job)))
        views = views_of(preset, root, started, lambda: [view_for(console)])
        session = build_training(preset, runtime, parallel, root, views, stop)
        if train_to_the_end(session, preset.train.runs) == "interrupted":
            step = session.trainer.progress.step
            raise Interrupted(
                f"interrupted at step {step}; everything is saved, start again to go on"
            )


def views_of(
    preset: Any, root: Path, started: float, on_screen: Callable[[], list[Any]]
) -> Callable[..., list[Any]]:
    """What `build_training` makes the views of a run with: its files, wandb if the preset asks for
    it, and those `on_screen`."""

    def make_views(
        folder: Path, start_event: dict, resolved: dict, wandb_id: str, notes: list[str]
    ) -> list[Any]:
        views = [RunCard(folder, resolved, started, root), LossPlot(folder), MaskedPlot(folder)]
        if preset.logging.wandb:
            from core.reports.wandb_mirror import open_wandb

            mirror, told = open_wandb(
                preset.logging.wandb_project, wandb_id, preset.name, resolved, folder
            )
            notes.append(told)
            views += [mirror] if mirror is not None else []
        return [*views, *on_screen()]

    return make_views


def train_to_the_end(session: TrainingSession, runs: int) -> str:
    """Train run after run and close everything; returns why the last one ended."""
    trainer, log, done = session.trainer, session.log, session.trainer.progress
    try:
        for warning in session.warnings:
            log.emit("warning", step=done.step, tokens=done.tokens, message=warning)
        log.emit(
            "run_start",
            step=done.step,
            tokens=done.tokens,
            **session.start_event,
            notes=session.notes,
        )
        while (reason := trainer.train()) != "interrupted" and done.horizon_runs < runs:
            begin_next_run(done, runs)
            now = {
                "run": done.run,
                "run_tokens": 0,
                "run_step": 0,
                "end_tokens": trainer.budget.run_end(done),
            }
            log.emit(
                "run_start",
                step=done.step,
                tokens=done.tokens,
                **session.start_event | now,
                notes=[],
            )
        return reason
    finally:
        trainer.store.wait()
        trainer.loader.close()
        log.close()
