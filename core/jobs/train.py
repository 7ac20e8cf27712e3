"""The `train` job: build everything, train run after run, leave the files of a run.

In:    a preset, the runtime, the ranks
Out:   checkpoints/<lineage>_*.pth and logs/<lineage>/
State: none
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from core.assembly.session import MakeViews, TrainingSession, build_training
from core.checkpoint.lineage import owned
from core.errors import Interrupted
from core.metrics.log import View
from core.parallel.protocol import Parallel
from core.parallel.ranks import on_rank_zero
from core.preset.base import PresetBase
from core.reports.curves_masked import MaskedPlot
from core.reports.run_card import LossPlot, RunCard
from core.runtime import Runtime
from core.signals import StopRequest
from core.training.progress import begin_next_run
from core.ui.dashboard import view_for


def train(
    preset: PresetBase,
    runtime: Runtime,
    parallel: Parallel,
    root: Path,
    started: float,
    console: TextIO,
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
    preset: PresetBase, root: Path, started: float, on_screen: Callable[[], list[View]]
) -> MakeViews:
    """Return what makes the views of a run: its files, wandb if the preset asks for it, and those
    on the screen.

    started   unix time at which the program was started
    """

    def make_views(
        folder: Path,
        start_event: dict[str, Any],
        resolved: dict[str, Any],
        wandb_id: str,
        notes: list[str],
    ) -> list[View]:
        views: list[View] = [
            RunCard(folder, resolved, started, root),
            LossPlot(folder),
            MaskedPlot(folder),
        ]
        if preset.logging.wandb:
            from core.reports.wandb_mirror import open_wandb

            project = preset.logging.wandb_project
            mirror, note = open_wandb(project, wandb_id, preset.name, resolved, folder)
            notes.append(note)
            views += [mirror] if mirror is not None else []
        return [*views, *on_screen()]

    return make_views


def train_to_the_end(session: TrainingSession, runs: int) -> str:
    """Train run after run and close everything; returns the reason that the last one ended.

    runs   runs that share their schedules
    """
    trainer, done = session.trainer, session.trainer.progress
    try:
        for warning in session.warnings:
            trainer.reporter.warn(warning)
        trainer.reporter.emit("run_start", **session.start_event, notes=session.notes)
        while (reason := trainer.train()) != "interrupted" and done.horizon_runs < runs:
            begin_next_run(done, runs)
            changed = {
                "run": done.run,
                "run_tokens": 0,
                "run_step": 0,
                "end_tokens": trainer.budget.run_end(done),
            }
            trainer.reporter.emit("run_start", **session.start_event | changed, notes=[])
        return reason
    finally:
        trainer.store.wait()
        trainer.loader.close()
        trainer.engine.close()
        session.log.close()
