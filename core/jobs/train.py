"""The `train` job: assemble, tell what is about to happen, train run after run, leave the files of a run.

In:    a preset, the runtime, the ranks
Out:   checkpoints/<lineage>_*.pth and logs/<lineage>/
State: none
"""

from pathlib import Path
from typing import Any

from core.assembly import begin_next_run, build_training
from core.errors import Interrupted
from core.runtime import Runtime, StopRequest
from core.ui.dashboard import view_for
from core.ui.run_card import LossPlot, RunCard


def train(preset: Any, runtime: Runtime, parallel: Any, root: Path, started: float, console: Any) -> None:
    """Train to the end of the preset's runs. Raises Interrupted after Ctrl-C or SIGTERM, with everything saved."""

    def make_views(folder: Path, start_event: dict, resolved: dict, wandb_id: str, notes: list[str]) -> list[Any]:
        views = [RunCard(folder, resolved, started, root), LossPlot(folder)]
        if preset.logging.wandb:
            from core.ui.wandb_mirror import open_wandb

            mirror, told = open_wandb(preset.logging.wandb_project, wandb_id, preset.name, resolved, folder)
            notes.append(told)
            views += [mirror] if mirror is not None else []
        return [*views, view_for(console)]

    with StopRequest() as stop:
        session = build_training(preset, runtime, parallel, root, make_views, stop)
        trainer, log, done = session.trainer, session.log, session.trainer.progress
        try:
            for warning in session.warnings:
                log.emit("warning", step=done.step, tokens=done.tokens, message=warning)
            log.emit("run_start", step=done.step, tokens=done.tokens, **session.start_event, notes=session.notes)
            while trainer.train() != "interrupted":
                if done.horizon_runs >= preset.train.runs:
                    return
                begin_next_run(done, preset.train.runs)
                log.emit("run_start", step=done.step, tokens=done.tokens, **session.start_event | {"run": done.run}, notes=[])
            raise Interrupted(f"interrupted at step {done.step}; everything is saved, start again to go on")
        finally:
            trainer.loader.close()
            trainer.store.wait()
            log.close()
