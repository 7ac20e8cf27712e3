"""The `evaluate` job: a trained model on tasks of lm-evaluation-harness, and on the text that its
training held out.

In:    a preset: its `init_from` or its lineage's newest checkpoint, its section `evaluate`, its
       data
Out:   logs/<lineage>/evaluate.json and evaluate.md, and their tables on the screen
State: evaluate.json: an interrupted evaluation goes on with what is not in it

    weights --> tasks, one after the other --> held-out documents, source by source --> tables

Under torchrun rank 0 does it alone.
"""

import hashlib
import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
from pydantic import Field

from core.checkpoint.weights import preview_weights
from core.contracts import plain_batch
from core.data.corpus import Corpus, open_held_out
from core.data.packing import Row
from core.data.validation import shortfall
from core.errors import Interrupted, NoData, UserError
from core.evaluation.blimp import NAME as BLIMP
from core.evaluation.blimp import blimp_notes, blimp_scores, load_pairs, score_pairs
from core.evaluation.harness.library import version
from core.evaluation.harness.scoring import Scorer
from core.evaluation.harness.tasks import open_tasks, run_task
from core.evaluation.harness.wrapper import as_harness_model
from core.evaluation.harness.writing import Writer
from core.evaluation.perplexity import held_out_rows, measure_perplexity
from core.evaluation.results import (
    NOT_CAUSAL,
    About,
    EvaluatedModel,
    SourceMeasurement,
    TaskMeasurement,
    files_of,
    read_results,
    source_table,
    task_scores,
    task_table,
    write_results,
)
from core.files import cause, own_path
from core.generation.engine import TextGenerator
from core.parallel.protocol import Parallel
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
"""Numbers of each tensor that go into the fingerprint of the weights."""


class EvaluateSettings(Settings):
    """The evaluate job: a trained model on tasks of lm-evaluation-harness, and on text held out
    from training."""

    tasks: list[Annotated[str, Field(min_length=1)]] = Field([])
    """Tasks by the harness's names, such as "gsm8k" or "mmlu_stem", or by those of files in
    `task_path`; "blimp" is a task of this program's own, which needs no harness."""
    blimp_path: str | None = Field(None, min_length=1)
    """Folder or zip that BLiMP's files are read from, relative to the project; left out, the
    Hub."""
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
    parallel: Parallel,
    root: Path,
    started: float,
    console: TextIO,
) -> None:
    """Measure what is not measured yet. Raises Interrupted after Ctrl-C, SIGTERM or SIGHUP, with
    every finished measurement kept."""
    if parallel.rank != 0:
        return
    settings = preset.evaluate
    if not settings.tasks and not settings.domain_perplexity:
        raise UserError(
            'there is nothing to evaluate: name some "evaluate.tasks", or set "domain_perplexity" '
            "to true"
        )
    if runtime.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # scores are promised in fp32
    with EvaluateView(console) as view, StopRequest() as stop:
        if set(settings.tasks) - {BLIMP}:
            version()  # a missing package is reported before gigabytes are read
        trained = load_trained(preset, root, runtime)
        for note in trained.notes:
            view.tell(f"note  {note}")
        runner = EvaluationRunner(trained, runtime, root, view, stop)
        runner.run_tasks()
        if settings.domain_perplexity:
            runner.measure_held_out()
        runner.finish()


def preview_evaluate(preset: EvaluatePreset, root: Path) -> list[str]:
    """Return the menu's lines on the job."""
    settings = preset.evaluate
    try:
        first = f"evaluates {preview_weights(preset.init_from or preset.lineage, root)}"
    except UserError as error:
        first = f"cannot start yet: {str(error).splitlines()[0]}"
    measured = []
    if settings.tasks:
        limit = f" (at most {settings.limit:,} examples of each)" if settings.limit else ""
        measured.append(f"the tasks {', '.join(settings.tasks)}{limit}")
    if settings.domain_perplexity:
        sources = ", ".join(source.name for source in preset.data.sources)
        measured.append(f"held-out documents of {sources}")
    return [
        first,
        f"on {'; '.join(measured) or 'nothing: name some tasks'}",
        f"writes logs/{preset.lineage}/evaluate.md and evaluate.json",
    ]


class EvaluationRunner:
    """One evaluation: a trained model, and what has been measured of it."""

    def __init__(
        self,
        trained: Trained[EvaluatePreset],
        runtime: Runtime,
        root: Path,
        view: EvaluateView,
        stop: StopRequest,
    ):
        """Raises UserError where the model gives no probabilities of next tokens."""
        preset = trained.preset
        self._trained, self._preset, self._settings = trained, preset, preset.evaluate
        self._root, self._view, self._stop = root, view, stop
        dtype = runtime.compute_dtype(preset.train.precision)
        self._machine = Machine(runtime, Single(), dtype)
        self._context = preset.model.seq_length
        self._folder = root / "logs" / preset.lineage
        self._about = _about(trained, self._machine)
        self._results, self._measured = read_results(self._folder), 0
        _check_next_token_model(trained, runtime.device)
        if self._about.not_causal:
            view.tell(f"warning  {self._about.not_causal}")

    def run_tasks(self) -> None:
        """Run every task that is not measured yet, one after the other."""
        settings, tasks = self._settings, self._results.tasks
        names = [name for name in dict.fromkeys(settings.tasks) if name != BLIMP]
        folder = own_path(settings.task_path, self._root) if settings.task_path else None
        made_from = self._made_from(
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            harness=self._about.harness,
            files=files_of(folder),
            seed=self._preset.train.seed,
        )
        of_blimp = self._made_from(limit=settings.limit, files=files_of(self._blimp_place()))
        expected = dict.fromkeys(names, made_from) | {BLIMP: of_blimp}
        self._results.tasks = {
            name: tasks[name]
            for name in dict.fromkeys(settings.tasks)
            if name in tasks and tasks[name].made_from == expected[name]
        }
        missing = [name for name in names if name not in self._results.tasks]
        loaded = open_tasks(missing, folder, self._view.tell) if missing else {}
        if BLIMP in settings.tasks and BLIMP not in self._results.tasks:
            self._keep(BLIMP, self._run_blimp(of_blimp))
        for name in missing:
            self._keep(name, self._run(name, loaded.pop(name), made_from))

    def _keep(self, name: str, measured: TaskMeasurement) -> None:
        """Write a finished task down, in the preset's order."""
        tasks = {**self._results.tasks, name: measured}
        self._results.tasks = {each: tasks[each] for each in self._settings.tasks if each in tasks}
        self._save()

    def _blimp_place(self) -> Path | None:
        path = self._settings.blimp_path
        return own_path(path, self._root) if path else None

    def _run_blimp(self, made_from: str) -> TaskMeasurement:
        trained, settings = self._trained, self._settings
        pairs = load_pairs(settings.blimp_path, self._root, settings.limit)
        scorer = Scorer(trained.model, self._context, settings.batch_size, self._machine.dtype)
        begun = time.monotonic()
        with self._view.task(BLIMP):
            accuracies = score_pairs(pairs, scorer, trained.tokenizer, self._progress)
        results = blimp_scores(accuracies, pairs)
        return TaskMeasurement(
            made_from=made_from,
            date=_now(),
            seconds=round(time.monotonic() - begun, 1),
            not_causal=self._about.not_causal,
            notes=blimp_notes(results),
            results=results,
        )

    def _run(self, name: str, loaded: Any, made_from: str) -> TaskMeasurement:
        """Run one task; `loaded`: the harness's own objects."""
        trained, settings, dtype = self._trained, self._settings, self._machine.dtype
        scorer = Scorer(trained.model, self._context, settings.batch_size, dtype)
        generator = TextGenerator(trained.model, trained.tokenizer, self._context)
        writer = Writer(generator, settings.batch_size, dtype, self._preset.train.seed)
        begun = time.monotonic()
        with self._view.task(name):
            model = as_harness_model(scorer, writer, trained.tokenizer, self._progress)
            results = run_task(model, loaded, settings.limit, settings.num_fewshot)
        return TaskMeasurement(
            made_from=made_from,
            date=_now(),
            seconds=round(time.monotonic() - begun, 1),
            not_causal=self._about.not_causal,
            notes=[f"{name}: {note}" for note in writer.notes],
            results=task_scores(results),
        )

    def measure_held_out(self) -> None:
        """Measure the held-out documents of every source that is not measured yet."""
        preset, trained = self._preset, self._trained
        tokens = preset.train.eval_tokens
        if tokens == 0:
            self._note("train.eval_tokens is 0: no held-out documents are measured")
            return
        made_from = self._made_from(
            data=preset_json(preset)["data"],
            tokens=tokens,
            seed=preset.train.seed,
            bytes="of the text",  # not of each token alone
        )
        self._results.sources = {
            name: source
            for name, source in self._results.sources.items()
            if source.made_from == made_from
        }
        if {source.name for source in preset.data.sources} <= set(self._results.sources):
            return
        corpus = self._open_held_out()
        if corpus is None:
            return
        rows = held_out_rows(corpus, trained.tokenizer, self._context, tokens)
        for name in corpus.names:
            if name not in self._results.sources:
                self._measure_source(name, rows[name], made_from)

    def _open_held_out(self) -> Corpus | None:
        """Open the data as training split them. Where there are none, raises NoData, or returns
        None after tasks."""
        trained = self._trained
        try:
            corpus, notes = open_held_out(
                self._preset, self._root, Single(), trained.made_with, trained.held_out
            )
        except NoData as error:
            if not self._settings.tasks:
                raise
            self._note(f"no held-out documents: {' '.join(str(error).split())}")
            return None
        remarks, warnings = corpus.tokenizer_remarks(trained.tokenizer)
        for note in [*notes, *remarks, *warnings]:
            self._note(note)
        return corpus

    def _measure_source(self, name: str, rows: list[Row], made_from: str) -> None:
        with self._view.task(f"held-out documents of {name}"):
            score = measure_perplexity(
                self._trained.model,
                rows,
                self._settings.batch_size,
                self._machine,
                self._progress,
            )
        if score is None:
            self._note(f"{name} holds no document out; nothing to measure there")
            return
        if message := shortfall(rows, self._preset.train.eval_tokens):
            self._note(f"{name}: {message}")
        self._results.sources[name] = SourceMeasurement(
            made_from=made_from, date=_now(), not_causal=self._about.not_causal, **asdict(score)
        )
        self._save()

    def finish(self) -> None:
        """Write and show everything that is known. Raises NoData where that is nothing."""
        about, results, view = self._about, self._results, self._view
        if not results.tasks and not results.sources:
            notes = "\n".join(f"  {note}" for note in about.notes)
            raise NoData(f"nothing could be measured:\n{notes}")
        if not self._measured:
            file = (self._folder / "evaluate.json").relative_to(self._root)
            view.tell(f"all of it was measured already; delete {file} to measure anew")
        self._write()  # notes may be new
        tables = {
            "tasks": task_table(about, results),
            "held-out documents": source_table(about, results),
        }
        for title, table in tables.items():
            if table.rows:
                view.table(title, table.header, table.rows)
        if about.not_causal:
            view.tell(about.not_causal)
        view.tell(f"report: {(self._folder / 'evaluate.md').relative_to(self._root)}")

    def _made_from(self, **parts: Any) -> str:
        """Return a fingerprint of what a number is made from: with any of it changed, it is
        measured anew."""
        made_from = {
            "weights": self._about.model.fingerprint,
            "precision": self._about.precision,
            "context": self._context,
            **parts,
        }
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]

    def _progress(self, done: int, total: int) -> None:
        if self._stop():
            raise Interrupted(
                f"interrupted after {self._measured} measurements; they are kept, start again to "
                "go on with the others"
            )
        self._view.update(done, total)

    def _note(self, note: str) -> None:
        self._view.tell(f"note  {note}")
        self._about.notes.append(note)

    def _save(self) -> None:
        self._measured += 1
        self._write()

    def _write(self) -> None:
        try:
            write_results(self._about, self._results, self._folder)
        except OSError as error:
            place = self._folder / "evaluate.json"
            raise UserError(
                f"{place} cannot be written: {cause(error, place)} Then start again."
            ) from None


def _check_next_token_model(trained: Trained[Any], device: torch.device) -> None:
    """Raise UserError where the model predicts masked tokens, or gives distances."""
    model = trained.preset.model
    if objective_of(model) != NEXT_TOKEN:
        raise UserError(
            f"{trained.where} holds a {model.type}, which fills in masked tokens and continues no "
            "text: tasks and perplexities ask for next tokens. Its own scores are in its "
            "training's logs: metrics.jsonl and masked.png."
        )
    one_token = plain_batch(torch.zeros(1, 1, dtype=torch.int64, device=device))
    with torch.no_grad():
        provides = trained.model(one_token).readout.provides
    if provides != "logits":
        raise UserError(
            "this model's readout gives distances, which are no probabilities of a next token: it "
            "has no such scores"
        )


def _about(trained: Trained[EvaluatePreset], machine: Machine) -> About:
    """Return what is evaluated, and how."""
    preset, model, settings = trained.preset, trained.model, trained.preset.evaluate
    causal = bool(model.is_causal)
    uses_harness = bool(set(settings.tasks) - {BLIMP})
    harness = {"package": "lm_eval", "version": version()} if uses_harness else None
    return About(
        preset=preset.name,
        lineage=preset.lineage,
        model=EvaluatedModel(
            weights=trained.where,
            step=trained.step,
            tokens=trained.tokens,
            type=preset.model.type,
            parameters=sum(p.numel() for p in model.parameters()),
            context=preset.model.seq_length,
            settings=preset.model.model_dump(mode="json"),
            causal=causal,
            fingerprint=_fingerprint(trained),
        ),
        not_causal=None if causal else NOT_CAUSAL,
        precision="bf16, scores in fp32" if machine.dtype == torch.bfloat16 else "fp32",
        device=machine.runtime.device_name,
        harness=harness,
        date=_now(),
        settings=settings.model_dump(mode="json"),
        notes=list(trained.notes),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _fingerprint(trained: Trained[Any]) -> str:
    """Return a fingerprint of the weights, their tokenizer and the state of their schedules."""
    settings = trained.preset.model.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps([settings, trained.step]).encode())
    digest.update(trained.tokenizer.fingerprint().encode())
    for name, tensor in sorted(trained.model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED)].float().cpu().numpy()
        digest.update(name.encode() + sample.tobytes())
    return digest.hexdigest()[:16]
