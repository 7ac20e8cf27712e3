"""The `evaluate` job: a trained model on tasks of lm-evaluation-harness, and on the text its
training held out.

In:    a preset: its `init_from` or its lineage's newest checkpoint, its section `evaluate`, its
       data
Out:   logs/<lineage>/evaluate.json and evaluate.md, and their tables on the screen
State: evaluate.json: whoever was stopped goes on with the tasks that are not in it

    weights --> tasks, one after the other --> held-out documents, source by source --> tables

Under torchrun rank 0 does it alone.
"""

import hashlib
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from core.checkpoint.weights import preview_weights
from core.contracts import plain_batch
from core.data.corpus import open_held_out
from core.data.validation import shortfall
from core.errors import Interrupted, NoData, UserError
from core.evaluation.harness.library import version
from core.evaluation.harness.scoring import Scorer
from core.evaluation.harness.tasks import open_tasks, run_task
from core.evaluation.harness.wrapper import as_harness_model
from core.evaluation.harness.writing import Writer
from core.evaluation.perplexity import held_out_rows, perplexity
from core.evaluation.results import (
    NOT_CAUSAL,
    of_harness,
    read_results,
    source_table,
    task_table,
    write_results,
)
from core.files import cause, own_path
from core.generation.engine import TextGenerator
from core.parallel.single import Single
from core.preset.base import PresetBase
from core.preset.merge import preset_json
from core.preset.settings import NEXT_TOKEN, Settings, objective_of
from core.runtime import Runtime
from core.signals import StopRequest
from core.trained import Trained, load_trained
from core.training.machine import Machine
from core.ui.evaluate import EvaluateView

SAMPLED = 1024
"""Numbers of each tensor that tell these weights from others."""


class EvaluateSettings(Settings):
    """The evaluate job: a trained model on tasks of lm-evaluation-harness, and on text held out
    from training."""

    tasks: list[Annotated[str, Field(min_length=1)]] = Field([])
    """Tasks by the harness's names, such as "gsm8k" or "mmlu_stem", or by those of files in
    `task_path`."""
    task_path: str | None = Field(None, min_length=1)
    """Folder of task files of your own (YAML), relative to the project. Paths in them begin in this
    folder."""
    limit: int | None = Field(None, ge=1)
    """Examples of a task; left out, all of them."""
    num_fewshot: int | None = Field(None, ge=0, le=1_000)
    """Solved examples before each question; left out, what the task says. A task that says 0 keeps
    it."""
    batch_size: int = Field(16, ge=1, le=1_000_000)
    """Rows of one forward pass. The results are the same for any."""
    domain_perplexity: bool = True
    """Also measure loss, perplexity and bits per byte on each source's held-out documents,
    `train.eval_tokens` of each."""


class EvaluatePreset(PresetBase):
    """A preset, as the evaluate job reads it."""

    evaluate: EvaluateSettings = EvaluateSettings()
    """The measurements of the evaluate job."""


def evaluate(
    preset: EvaluatePreset,
    runtime: Runtime,
    parallel: Any,
    root: Path,
    started: float,
    console: Any,
) -> None:
    """Measure what is not measured yet. Raises Interrupted after Ctrl-C, SIGTERM or SIGHUP, with
    every finished task kept."""
    if parallel.rank != 0:
        return
    wanted = preset.evaluate
    if not wanted.tasks and not wanted.domain_perplexity:
        raise UserError(
            'there is nothing to evaluate: name some "evaluate.tasks", or set "domain_perplexity" '
            "to true"
        )
    if runtime.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # scores are promised in fp32
    with EvaluateView(console) as view, StopRequest() as stop:
        if wanted.tasks:
            version()  # a package that is missing is told before gigabytes are read
        trained = load_trained(preset, root, runtime)
        for note in trained.notes:
            view.tell(f"note  {note}")
        desk = EvaluationRunner(trained, runtime, root, view, stop)
        desk.tasks()
        if wanted.domain_perplexity:
            desk.held_out()
        desk.finish()


def preview_evaluate(preset: EvaluatePreset, root: Path) -> list[str]:
    """What the menu tells before the job is chosen."""
    wanted = preset.evaluate
    try:
        first = f"evaluates {preview_weights(preset.init_from or preset.lineage, root)}"
    except UserError as error:
        first = f"cannot start yet: {str(error).splitlines()[0]}"
    what = []
    if wanted.tasks:
        limit = f" (at most {wanted.limit:,} examples of each)" if wanted.limit else ""
        what.append(f"the tasks {', '.join(wanted.tasks)}{limit}")
    if wanted.domain_perplexity:
        what.append(
            f"held-out documents of {', '.join(source.name for source in preset.data.sources)}"
        )
    return [
        first,
        f"on {'; '.join(what) or 'nothing: name some tasks'}",
        f"writes logs/{preset.lineage}/evaluate.md and evaluate.json",
    ]


class EvaluationRunner:
    """One evaluation: what it measures, and what it has found."""

    def __init__(
        self, trained: Trained, runtime: Runtime, root: Path, view: EvaluateView, stop: StopRequest
    ):
        self._trained, self._preset, self._root, self._view, self._stop = (
            trained,
            trained.preset,
            root,
            view,
            stop,
        )
        self._wanted = self._preset.evaluate
        self._machine = Machine(
            runtime, Single(), runtime.compute_dtype(self._preset.train.precision)
        )
        self._device, self._dtype = self._machine.device, self._machine.dtype
        self._folder = root / "logs" / self._preset.lineage
        self._context = self._preset.model.seq_length
        self._precision = "bf16, scores in fp32" if self._dtype == torch.bfloat16 else "fp32"
        self._weights = _fingerprint(trained)
        self._findings, self._measured = read_results(self._folder, self._about(runtime)), 0
        with torch.no_grad():
            provides = trained.model(
                plain_batch(torch.zeros(1, 1, dtype=torch.int64, device=self._device))
            ).readout.provides
        if objective_of(self._preset.model) != NEXT_TOKEN:
            raise UserError(
                f"{trained.where} holds a {self._preset.model.type}, which fills in masked tokens "
                "and continues no text: tasks "
                "and perplexities ask for next tokens. Its own scores stand in its training's "
                "logs: metrics.jsonl and masked.png."
            )
        if provides != "logits":
            raise UserError(
                "this model's readout gives distances, which are no probabilities of a next "
                "token: it has no such scores"
            )
        if self._findings.note:
            view.tell(f"warning  {self._findings.note}")

    def _about(self, runtime: Runtime) -> dict[str, Any]:
        """What is evaluated, and how."""
        trained, preset = self._trained, self._preset
        causal = bool(trained.model.is_causal)  # type: ignore[arg-type]
        return {
            "preset": preset.name,
            "lineage": preset.lineage,
            "model": {
                "weights": trained.where,
                "step": trained.step,
                "tokens": trained.tokens,
                "type": preset.model.type,
                "parameters": sum(p.numel() for p in trained.model.parameters()),
                "context": self._context,
                "settings": preset.model.model_dump(mode="json"),
                "causal": causal,
                "fingerprint": self._weights,
            },
            "not_causal": None if causal else NOT_CAUSAL,
            "precision": self._precision,
            "device": runtime.device_name,
            "harness": {"package": "lm_eval", "version": version()} if self._wanted.tasks else None,
            "date": _now(),
            "settings": self._wanted.model_dump(mode="json"),
            "notes": list(trained.notes),
        }

    def _mark(self, **facts: Any) -> str:
        """What a number is made from, in short: with any of it changed, it is measured anew."""
        made_from = {
            "weights": self._weights,
            "precision": self._precision,
            "context": self._context,
            **facts,
        }
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]

    def tasks(self) -> None:
        """Run every task that is not done, one name after the other."""
        names = list(dict.fromkeys(self._wanted.tasks))
        folder = own_path(self._wanted.task_path, self._root) if self._wanted.task_path else None
        mark = self._mark(
            limit=self._wanted.limit,
            num_fewshot=self._wanted.num_fewshot,
            harness=self._findings.about["harness"],
            files=_files_of(folder),
            seed=self._preset.train.seed,
        )
        kept = self._findings.tasks
        self._findings.tasks = {
            name: kept[name] for name in names if kept.get(name, {}).get("made_from") == mark
        }
        missing = [name for name in names if name not in self._findings.tasks]
        if not missing:
            return
        loaded = open_tasks(missing, folder, self._view.tell)
        for name in missing:
            model, tokenizer = self._trained.model, self._trained.tokenizer
            how = self._wanted.batch_size, self._dtype
            scorer = Scorer(model, self._context, *how)
            writer = Writer(
                TextGenerator(model, tokenizer, self._context), *how, self._preset.train.seed
            )  # type: ignore[arg-type]
            begun = time.monotonic()
            with self._view.task(name):
                model = as_harness_model(scorer, writer, tokenizer, self._told)
                found = run_task(
                    model, loaded.pop(name), self._wanted.limit, self._wanted.num_fewshot
                )
            self._findings.tasks[name] = {
                "made_from": mark,
                "date": _now(),
                "seconds": round(time.monotonic() - begun, 1),
                "not_causal": self._findings.note,
                "notes": [f"{name}: {note}" for note in writer.notes],
                "results": of_harness(found),
            }
            self._findings.tasks = {
                each: self._findings.tasks[each] for each in names if each in self._findings.tasks
            }
            self._keep()

    def held_out(self) -> None:
        """Measure every source that is not measured."""
        preset, trained = self._preset, self._trained
        if preset.train.eval_tokens == 0:
            self._note("train.eval_tokens is 0: no held-out documents are measured")
            return
        # not of each token alone
        how = {
            "tokens": preset.train.eval_tokens,
            "seed": preset.train.seed,
            "bytes": "of the text",
        }
        mark = self._mark(data=preset_json(preset)["data"], **how)
        kept = self._findings.sources
        self._findings.sources = {
            name: found for name, found in kept.items() if found.get("made_from") == mark
        }
        if {source.name for source in preset.data.sources} <= set(self._findings.sources):
            return
        try:
            corpus, notes = open_held_out(
                preset, self._root, Single(), trained.made_with, trained.held_out
            )
        except NoData as error:
            if not self._wanted.tasks:
                raise
            self._note(f"no held-out documents: {' '.join(str(error).split())}")
            return
        for note in [
            *notes,
            *(told for kind in corpus.tokenizer_remarks(trained.tokenizer) for told in kind),
        ]:
            self._note(note)
        rows = held_out_rows(corpus, trained.tokenizer, self._context, preset.train.eval_tokens)
        for name in corpus.names:
            if name in self._findings.sources:
                continue
            with self._view.task(f"held-out documents of {name}"):
                found = perplexity(
                    trained.model, rows[name], self._wanted.batch_size, self._machine, self._told
                )
            if found is None:
                self._note(f"{name} holds no document out; nothing to measure there")
                continue
            if message := shortfall(rows[name], preset.train.eval_tokens):
                self._note(f"{name}: {message}")
            self._findings.sources[name] = {
                "made_from": mark,
                "date": _now(),
                "not_causal": self._findings.note,
                **found,
            }
            self._keep()

    def finish(self) -> None:
        """Show everything that is known."""
        if not self._findings.tasks and not self._findings.sources:
            raise NoData(
                "nothing could be measured:\n"
                + "\n".join(f"  {note}" for note in self._findings.about["notes"])
            )
        if not self._measured:
            file = (self._folder / "evaluate.json").relative_to(self._root)
            self._view.tell(f"all of it was measured already; delete {file} to measure anew")
        self._write()  # notes may be new
        for title, (header, rows) in (
            ("tasks", task_table(self._findings)),
            ("held-out documents", source_table(self._findings)),
        ):
            if rows:
                self._view.table(title, header, rows)
        if self._findings.note:
            self._view.tell(self._findings.note)
        self._view.tell(f"report: {(self._folder / 'evaluate.md').relative_to(self._root)}")

    def _told(self, done: int, total: int) -> None:
        if self._stop():
            raise Interrupted(
                f"interrupted after {self._measured} measurements; they are kept, start again to "
                "go on with the others"
            )
        self._view.update(done, total)

    def _note(self, note: str) -> None:
        self._view.tell(f"note  {note}")
        self._findings.about["notes"].append(note)

    def _keep(self) -> None:
        self._measured += 1
        self._write()

    def _write(self) -> None:
        try:
            write_results(self._findings, self._folder)
        except OSError as error:
            place = self._folder / "evaluate.json"
            raise UserError(
                f"{place} cannot be written: {cause(error, place)} Then start again."
            ) from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _fingerprint(trained: Trained) -> str:
    """Tells these weights, their tokenizer and the state of their schedules from others."""
    digest = hashlib.sha256(
        json.dumps([trained.preset.model.model_dump(mode="json"), trained.step]).encode()
    )
    digest.update(trained.tokenizer.fingerprint().encode())
    for name, tensor in sorted(trained.model.state_dict().items()):
        flat = tensor.detach().flatten()
        digest.update(
            name.encode() + flat[:: max(1, len(flat) // SAMPLED)].float().cpu().numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def _files_of(folder: Path | None) -> list[list[Any]]:
    """The files of a folder, their sizes and dates: changed tasks are run anew."""
    paths = (
        sorted(
            path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
        )
        if folder
        else []
    )
    return [[str(path), (found := path.stat()).st_size, found.st_mtime_ns] for path in paths]
