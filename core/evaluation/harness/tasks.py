"""The harness's tasks by name, its own and those of a folder, each with its data.

In:    names; a folder of YAML files
Out:   what the harness loads for each name; its results
State: none; data sets are kept where the package `datasets` keeps them
"""

import contextlib
import difflib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core.errors import MissingPackage, NoData, SourceUnavailable, UserError
from core.evaluation.harness.library import PACKAGE, harness
from core.hf_hub import check_reachable, explain

FEWSHOT_SEED = 1234
"""The harness's own: which examples stand before a question."""
BOOTSTRAPS = 1000
"""Draws for the standard error of a metric that has no formula for it. The harness takes 100,000,
which is minutes."""


def open_tasks(
    names: list[str], folder: Path | None, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Load {name: its tasks and groups, with their data}. Raises UserError, NoData or
    MissingPackage before anything is scored.

    folder   of task files, where relative paths in them begin; its tasks come before the harness's
             own of the same name
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"evaluate.task_path: there is no folder {folder}")
    manager_class = harness("tasks").TaskManager
    paths = [str(folder)] if folder is not None else []
    manager = manager_class(include_path=paths, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        tell("looking through the tasks of lm_eval")
        manager = manager_class(include_path=paths)
    _check_names(names, manager, folder)
    with _inside(folder):
        local = all(_reads_local_files(manager.task_index[name].cfg) for name in names)
        unreachable = "" if local else _why_unreachable()
        with _offline() if unreachable else contextlib.nullcontext():
            return {name: _load(manager, name, unreachable) for name in names}


def run_task(model: Any, loaded: Any, limit: int | None, num_fewshot: int | None) -> dict[str, Any]:
    """Return the harness's results for what one name stands for, set up as by its own command
    line. `loaded`: from `open_tasks`."""
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"task {name} runs code that the model has written, which this program never "
                "does; take it out"
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(
                f"task {name} shows pictures or plays sounds, and these models read text only; "
                "take it out"
            )
        configured = task.get_config("num_fewshot")
        if num_fewshot is not None and configured != 0:  # a task that says 0 means it
            task.set_config("num_fewshot", num_fewshot)
        elif configured is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no processes of its own
    ignored = io.StringIO()  # whatever the harness prints
    with contextlib.redirect_stdout(ignored), contextlib.redirect_stderr(ignored):
        return harness("evaluator").evaluate(
            lm=model,
            task_dict=loaded,
            limit=limit,
            log_samples=False,
            bootstrap_iters=BOOTSTRAPS,
        )


def _check_names(names: list[str], manager: Any, folder: Path | None) -> None:
    """Check that all tasks exist. Raises UserError naming the unknown ones, and the nearest known
    ones."""
    problems = []
    for name in names:
        if name in manager.task_index:
            continue
        near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
        hint = (
            f"did you mean {', '.join(near)}?" if near else "known ones: python -m lm_eval ls tasks"
        )
        problems.append(f"  {name}: {hint}")
    if problems:
        where = "the harness" if folder is None else f"neither the harness nor {folder}"
        verb = "does not know" if folder is None else "knows"
        raise UserError(f"evaluate.tasks: {where} {verb}\n" + "\n".join(problems))


def _load(manager: Any, name: str, unreachable: str) -> Any:
    try:
        return manager.load([name])
    except ImportError as error:
        text = " ".join(str(error).split())[:300]
        raise MissingPackage(
            f"task {name} needs more packages: {text}\npip install {PACKAGE} may bring them."
        ) from None
    except Exception as error:  # whatever a task's own code, `datasets` and the Hub raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        config = manager.task_index[name].cfg
        local = _reads_local_files(config)
        if unreachable and not local:
            raise NoData(
                f"task {name} needs a data set of the Hugging Face Hub that is not on this "
                f"machine, and {unreachable}.\n"
                "Start it once with a network, which keeps the data; or evaluate on tasks of your "
                "own (evaluate.task_path)."
            ) from None
        if not local and isinstance(error, OSError):
            text = explain(error, str((config or {}).get("dataset_path", name)))
        raise UserError(f"task {name} cannot be loaded: {text}") from None


def _reads_local_files(config: dict[str, Any] | None) -> bool:
    """Return whether a task's file says that its data are files. Of a group, this is not known
    before it is loaded."""
    config = config or {}
    return (
        "data_files" in (config.get("dataset_kwargs") or {})
        or Path(str(config.get("dataset_path", "absent"))).is_dir()
    )


def _why_unreachable() -> str:
    """Return why the Hub cannot be reached; "" where it can."""
    try:
        check_reachable()
    except SourceUnavailable as error:
        return str(error).split(";")[0]
    return ""


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let `datasets` take what it has, at once: otherwise it would try to connect for half a minute
    for each data set."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    """Change to a folder, as if the harness had been started there."""
    before = Path.cwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)
