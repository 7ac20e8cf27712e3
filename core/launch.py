"""From a bare process to a running job: who asks, who listens, and what the menu shows.

In:    standard input (a terminal, or one line naming a preset), torchrun's variables, .env,
       configs/*.json
Out:   the chosen preset's job, run on every rank
State: none
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from core.assembly import MIRRORS, Preset, what_goes_on
from core.checkpoint.lineage import changed_sources
from core.checkpoint.store import CheckpointStore
from core.checkpoint.weights import preview_weights
from core.data.tokenizer import KNOWN_VOCABULARIES, tokenizer_facts
from core.environment import read_dotenv
from core.errors import Interrupted, PresetError, UserError
from core.file_names import slot_name
from core.files import own_path
from core.jobs import JOBS, PREVIEWS
from core.metrics.log import LOG, evaluation_is_missing
from core.parallel.ddp import DDP
from core.parallel.single import Single
from core.preset.decode import decode_preset, preset_json, read_preset
from core.preset.settings import RUN_TOKENS
from core.reports.run_card import is_positive, read_card
from core.runtime import Runtime, detect_runtime, prepare
from core.terminal import tell
from core.training.memory import check_memory, memory_estimate, size_of
from core.ui.menu import PresetCard, can_pick, choose
from core.ui.resume import offer_fresh
from core.ui.text import count

ROOT = Path(__file__).resolve().parent.parent
DEFAULT, SCHEMA = "00_best_general", "preset.schema.json"
GROUPS = {
    "0": "Baseline language model",
    "1": "NeoBERT with harmonic loss",
    "2": "PolychromaticLM",
    "3": "Cosine objective",
    "4": "Sharpness penalties",
    "5": "Auxiliary heads",
    "6": "Auxiliary heads",
    "9": "Quick tests",
}
LARGE = 100_000_000
"""Parameters from which on the menu tells which cards a model fits."""
CARDS, USABLE = (24, 80, 141), 0.92
"""Gigabytes of usual cards, and the share of them that a program gets."""
SAME = 0.05
"""By how much runs of the same length may differ: the last step goes beyond the end."""
PATIENCE = timedelta(days=7)
"""How long the other ranks wait for a person at the menu."""


def launch(started: float) -> None:
    """Run what is chosen. Raises UserError, Interrupted or KeyboardInterrupt; every rank ends with
    the same outcome."""
    runtime = detect_runtime()
    prepare(runtime)
    # on every rank, and before any library looks for a token
    for note in read_dotenv(ROOT / ".env"):
        if runtime.rank == 0:
            tell(note)
    if runtime.world_size == 1:
        return _run_until_one_starts(runtime, started)
    store = _store()
    preset = _agree_on_preset(runtime, store)
    if preset is None:  # rank 0 has said why
        sys.exit(2)
    parallel = DDP(runtime.device, store, runtime.rank, runtime.world_size)
    try:
        JOBS[preset.job](preset, runtime, parallel, ROOT, started, sys.stdout)
    finally:
        parallel.close()


def _run_until_one_starts(runtime: Runtime, started: float) -> None:
    """Run what is chosen. Where a menu is open, what is refused before it has done anything leads
    back to it."""
    refused: tuple[str, str] | None = None
    while True:
        stem, preset = _ask(runtime, refused)
        before = _work_of(preset)
        try:
            _offer_fresh(preset)
            return JOBS[preset.job](preset, runtime, Single(), ROOT, started, sys.stdout)
        except UserError as error:
            if isinstance(error, Interrupted) or not can_pick() or _work_of(preset) != before:
                raise
            tell(f"\n{error}")
            refused, started = (stem, str(error)), time.time()


def _work_of(preset: Any) -> dict[Path, int]:
    """What runs of a preset have left behind: its files, and when each was last written."""
    checkpoints, tokens = ROOT / "checkpoints", own_path(preset.tokenize.output, ROOT)
    files = [
        *checkpoints.glob(slot_name(preset.lineage, "*")),
        *(checkpoints / preset.lineage).rglob("*.pth"),
    ]
    files += (ROOT / "logs" / preset.lineage).rglob(LOG)
    files += tokens.glob("*/*.bin") if preset.job == "tokenize" else []
    return {path: path.stat().st_mtime_ns for path in files if path.is_file()}


def _agree_on_preset(runtime: Runtime, store: Any) -> Any:
    """Rank 0 asks; the others get the JSON text through the rendezvous store, before any process
    group has a clock running."""
    if runtime.rank == 0:
        try:
            _, preset = _ask(runtime)
            _offer_fresh(preset)
        except BaseException:
            store.set("zeroarg/preset", "")
            raise
        store.set("zeroarg/preset", json.dumps(preset_json(preset)))
        return preset
    text = store.get("zeroarg/preset").decode()
    return (
        decode_preset(json.loads(text), Preset, "the preset from rank 0", "preset")
        if text
        else None
    )


def _store() -> Any:
    """torchrun's rendezvous store: no process group and no watchdog yet."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = not agent_has_it and os.environ["RANK"] == "0"
    try:
        store: Any = dist.TCPStore(
            address, port, int(os.environ["WORLD_SIZE"]), is_host, timeout=timedelta(minutes=5)
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes cannot meet at {address}:{port} (MASTER_ADDR, MASTER_PORT): "
            f"{str(error).splitlines()[0][:200]}. "
            "Start all of them, with the address of the machine that has RANK 0, and a port that "
            "is free there."
        ) from None
    store = dist.PrefixStore(f"zeroarg/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    store.set_timeout(PATIENCE)
    return store


def _ask(runtime: Runtime, refused: tuple[str, str] | None = None) -> tuple[str, Any]:
    """File stem and preset that a person, or the first line of standard input, chooses.

    refused   a preset that was chosen before and could not start, and why
    """
    while True:
        presets, cards = _read_presets(runtime)
        default = DEFAULT if refused is None else refused[0]
        if refused is not None:
            cards = [
                replace(card, refusal=refused[1]) if card.stem == default else card
                for card in cards
            ]
        stem = choose(cards, default)
        if stem in presets:
            return stem, presets[stem]
        # it has a problem, which the menu shows: perhaps it is mended meanwhile
        refused = (stem, "")


def _offer_fresh(preset: Any) -> None:
    """Where the chosen preset would go on from a checkpoint, ask whether it shall."""
    if preset.job in ("train", "compare"):
        offer_fresh(
            ROOT, preset.lineage, lambda: _whatever_can_be_told(lambda: _standing_lines(preset))
        )


def _read_presets(runtime: Runtime) -> tuple[dict[str, Any], list[PresetCard]]:
    """Every preset that can be read, and a card for each file."""
    paths = [
        path
        for path in sorted((ROOT / "configs").glob("*.json"))
        if path.name[0] != "." and path.name != SCHEMA
    ]
    if not paths:
        raise UserError(f"there are no presets in {ROOT / 'configs'}")
    presets: dict[str, Any] = {}
    cards = []
    for path in paths:
        group = GROUPS.get(path.stem[0], "Your own")
        try:
            preset = read_preset(path, Preset)
        except Exception as error:  # whatever is wrong with one file, the others can be chosen
            why = (
                str(error)
                if isinstance(error, PresetError)
                else f"{path} cannot be read: {type(error).__name__}: {error}"
            )
            cards.append(PresetCard(path.stem, group, path.stem, "", problem=why))
        else:
            presets[path.stem] = preset
            cards.append(_card(path.stem, preset, runtime))
    return presets, cards


def _card(stem: str, preset: Any, runtime: Runtime) -> PresetCard:
    """What the menu tells about a preset before it is chosen."""
    short = preset.job in ("train", "compare") and (
        preset.train.max_steps is not None or preset.train.max_epochs is not None
    )
    description = " · ".join(part for part in ("short" * short, preset.description) if part)
    group = GROUPS.get(stem[0], "Your own")
    return PresetCard(
        stem, group, preset.name, description, lambda: "\n".join(_preview(preset, runtime))
    )


def _preview(preset: Any, runtime: Runtime) -> list[str]:
    """What a preset would do. Each part stands for itself: one that cannot be told leaves the
    others."""
    lines = []
    if preset.job in ("train", "compare"):
        lines += _whatever_can_be_told(lambda: _training_lines(preset, runtime))
    lines += _whatever_can_be_told(lambda: _standing_lines(preset))
    if preset.job not in PREVIEWS and (
        time_told := _whatever_can_be_told(lambda: [_time_line(preset, runtime)])[0]
    ):
        lines[-1] += time_told
    return lines


def _standing_lines(preset: Any) -> list[str]:
    """Where a preset stands, and goes on."""
    return (
        PREVIEWS[preset.job](preset, ROOT)
        if preset.job in PREVIEWS
        else _resume_line(preset).split("\n")
    )


def _whatever_can_be_told(lines: Callable[[], list[str]]) -> list[str]:
    """The lines; or one that says why not: a preview judges nothing, and the job will say what is
    wrong."""
    try:
        return lines()
    except Exception as error:
        return [f"cannot tell more: {type(error).__name__}: {error}".splitlines()[0][:300]]


def _training_lines(preset: Any, runtime: Runtime) -> list[str]:
    """What a run would be: size, data, machine."""
    vocab_size = _vocab_size(preset.tokenizer)
    train = preset.train
    try:
        model = size_of(preset, vocab_size)
        check_memory(preset, vocab_size, runtime)
    except UserError as error:
        return [f"cannot start yet: {str(error).splitlines()[0]}"]
    bf16 = runtime.compute_dtype(train.precision) == torch.bfloat16
    if model is None:  # of the Hub: the menu downloads nothing
        size, memory = preset.model.summary(), ""
    else:
        size = f"{count(model.parameters)} parameters"
        size += f" ({count(model.trained)} trained)" if model.trained < model.parameters else ""
        fixed, row = memory_estimate(preset, model, vocab_size, bf16)
        memory = f", about {(fixed + row * train.per_gpu_batch_size) / 2**30:.1f} GB of memory"
    rows = train.per_gpu_batch_size * train.accumulation_steps * runtime.world_size
    limits = f"at most {train.max_steps:,} steps" if train.max_steps else f"{RUN_TOKENS:,} tokens"
    if train.max_epochs:
        limits += f", at most {train.max_epochs} epoch{'s' if train.max_epochs > 1 else ''}"
    if train.runs > 1:
        limits += f", {train.runs} runs"
    lines = [
        f"{size}, {limits} in steps of {rows * preset.model.seq_length:,}",
        f"reads {', '.join(source.name for source in preset.data.sources)}",
        f"on {runtime.device_name}, {'bf16' if bf16 else 'fp32'}{memory}",
    ]
    if model is not None and model.parameters >= LARGE:
        lines.append(
            _cards_line(
                *memory_estimate(preset, model, vocab_size, bf16=True), train.per_gpu_batch_size
            )
        )
    return lines


def _cards_line(fixed: int, row: int, wanted: int) -> str:
    """How large a micro-batch fits cards of usual sizes."""
    rows = {card: max(0, int((card * 2**30 * USABLE - fixed) // row)) for card in CARDS}
    fits = ", ".join(f"{n or 'no'} row{'s' * (n != 1)} on {card} GB" for card, n in rows.items())
    return (
        f"micro-batches that fit a card in bf16: {fits}; the preset's {wanted} take "
        f"{(fixed + row * wanted) / 2**30:.0f} GB"
    )


def _vocab_size(tokenizer: Any) -> int:
    """Of a preset's tokenizer, as far as it is known before it is made or loaded."""
    if tokenizer.type == "file":
        return tokenizer_facts(own_path(tokenizer.path, ROOT)).get("vocab_size", 50_257)
    if tokenizer.type == "hub":
        return KNOWN_VOCABULARIES.get(tokenizer.name, 50_257)
    return {"bpe": tokenizer.vocab_size, "byte": 257}[tokenizer.type]


def _resume_line(preset: Any) -> str:
    found = CheckpointStore(
        ROOT / "checkpoints", preset.lineage, MIRRORS.get(preset.lineage)
    ).peek()
    if found is None:
        return _beginning_line(preset)
    progress, where = found["progress"], found["path"].name
    log_file = ROOT / "logs" / preset.lineage / LOG
    does = what_goes_on(preset, found, lambda: evaluation_is_missing(log_file, progress["step"]))
    if does == "evaluation":
        line = (
            f"evaluates run {progress['run']}, which was trained to its end, step "
            f"{progress['step']:,}, from {where}"
        )
    elif does == "next run":
        line = f"starts run {progress['run'] + 1} from step {progress['step']:,} in {where}"
    else:
        line = (
            f"resumes run {progress['run']} at step {progress['step']:,}, "
            f"{progress['run_tokens']:,} tokens, from {where}"
        )
    return "\n".join([*changed_sources(found, preset), line])


def _beginning_line(preset: Any) -> str:
    """What a lineage without a checkpoint begins with."""
    if preset.init_from is None:
        published = getattr(preset.model, "published", None)
        return f"starts from the published weights of {published}" if published else "starts fresh"
    try:
        return f"starts from the weights of {preview_weights(preset.init_from, ROOT)}"
    except UserError as error:
        return f"cannot start yet: {error}"


def _time_line(preset: Any, runtime: Runtime) -> str:
    """How long a run takes, when this machine has trained the preset before."""
    card = read_card(ROOT / "logs" / preset.lineage)
    facts = tuple(card.get(key) for key in ("preset", "device", "world_size"))
    size, speed = (card.get(key) for key in ("tokens_per_step", "tokens_per_second"))
    if facts != (preset.name, runtime.device_name, runtime.world_size) or not (
        is_positive(size) and is_positive(speed)
    ):
        return ""
    tokens = min(RUN_TOKENS, (preset.train.max_steps or RUN_TOKENS) * size)
    if preset.train.max_epochs and is_positive(end := card.get("end_tokens")):
        tokens = min(tokens, end)
    whole = card.get("whole_run")
    took = [whole.get(key) for key in ("seconds", "tokens")] if isinstance(whole, dict) else []
    seconds, said = tokens / speed, "would take"  # without evaluations, as long as no run was whole
    if took and all(map(is_positive, took)):
        seconds = took[0] * tokens / took[1]
        said = "took" if abs(tokens / took[1] - 1) < SAME else said
    minutes = seconds / 60
    return f"; a run {said} about " + (
        f"{minutes / 60:.1f} h here" if minutes > 90 else f"{max(minutes, 1):.0f} min here"
    )
