"""The lines that the menu shows of a preset before it is chosen: what it would train, on which
machine, from which weights, for how long.

In:    a preset, the runtime, the project's root folder
Out:   a card for the menu
State: none; nothing is downloaded, nothing is written
"""

from collections.abc import Callable
from pathlib import Path

import torch

from core.assembly import MIRRORS, what_goes_on
from core.checkpoint.lineage import changed_sources
from core.checkpoint.store import CheckpointStore
from core.checkpoint.weights import preview_weights
from core.data.tokenizer import KNOWN_VOCABULARIES, tokenizer_facts
from core.errors import UserError
from core.files import own_path
from core.jobs import JOBS
from core.metrics.log import LOG, evaluation_is_missing
from core.preset.base import PresetBase
from core.preset.settings import RUN_TOKENS, TokenizerSettings
from core.reports.run_card import is_positive, read_card
from core.runtime import Runtime
from core.training.memory import check_memory, memory_estimate, size_of
from core.ui.menu import PresetCard
from core.ui.text import count

OWN = "Your own"
"""The heading of presets that name none."""
LARGE = 100_000_000
"""Parameters from which on the menu tells which GPUs a model fits."""
GPUS, USABLE = (24, 80, 141), 0.92
"""Gigabytes of usual GPUs, and the share of them that a program gets."""
SAME = 0.05
"""By how much runs of the same length may differ: the last step goes beyond the end."""


def preset_card(stem: str, preset: PresetBase, runtime: Runtime, root: Path) -> PresetCard:
    """Make the menu's card of a preset; its preview is computed when it is shown."""
    train, trains = preset.train, preset.job in ("train", "compare")
    short = trains and (train.max_steps is not None or train.max_epochs is not None)
    description = " · ".join(part for part in ("short" * short, preset.description) if part)
    return PresetCard(
        stem,
        preset.group or OWN,
        preset.name,
        description,
        lambda: "\n".join(preview(preset, runtime, root)),
    )


def preview(preset: PresetBase, runtime: Runtime, root: Path) -> list[str]:
    """Tell what a preset would do. Each part stands for itself: where one fails, the others
    stay."""
    lines = []
    if preset.job in ("train", "compare"):
        lines += _or_why_not(lambda: _training_lines(preset, runtime, root))
    lines += standing_lines(preset, root)
    if JOBS[preset.job].preview is None:
        lines[-1] += _or_why_not(lambda: [_time_line(preset, runtime, root)])[0]
    return lines


def standing_lines(preset: PresetBase, root: Path) -> list[str]:
    """Tell where a preset stands, and from where it would go on."""
    of_job = JOBS[preset.job].preview
    if of_job is not None:
        return _or_why_not(lambda: of_job(preset, root))
    return _or_why_not(lambda: _resume_line(preset, root).split("\n"))


def _or_why_not(lines: Callable[[], list[str]]) -> list[str]:
    """The lines; or one that says why not: a preview judges nothing, and the job will say what is
    wrong."""
    try:
        return lines()
    except Exception as error:
        return [f"cannot tell more: {type(error).__name__}: {error}".splitlines()[0][:300]]


def _training_lines(preset: PresetBase, runtime: Runtime, root: Path) -> list[str]:
    """What a run would be: size, data, machine."""
    vocab_size = _vocab_size(preset.tokenizer, root)
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
            _gpus_line(
                *memory_estimate(preset, model, vocab_size, bf16=True), train.per_gpu_batch_size
            )
        )
    return lines


def _gpus_line(fixed: int, row: int, wanted: int) -> str:
    """How large a micro-batch fits cards of usual sizes."""
    rows = {card: max(0, int((card * 2**30 * USABLE - fixed) // row)) for card in GPUS}
    fits = ", ".join(f"{n or 'no'} row{'s' * (n != 1)} on {card} GB" for card, n in rows.items())
    return (
        f"micro-batches that fit a card in bf16: {fits}; the preset's {wanted} take "
        f"{(fixed + row * wanted) / 2**30:.0f} GB"
    )


def _vocab_size(tokenizer: TokenizerSettings, root: Path) -> int:
    """Of a preset's tokenizer, as far as it is known before it is made or loaded."""
    if tokenizer.type == "file":
        return tokenizer_facts(own_path(tokenizer.path, root)).get("vocab_size", 50_257)
    if tokenizer.type == "hub":
        return KNOWN_VOCABULARIES.get(tokenizer.name, 50_257)
    return {"bpe": tokenizer.vocab_size, "byte": 257}[tokenizer.type]


def _resume_line(preset: PresetBase, root: Path) -> str:
    found = CheckpointStore(
        root / "checkpoints", preset.lineage, MIRRORS.get(preset.lineage)
    ).peek()
    if found is None:
        return _beginning_line(preset, root)
    progress, where = found["progress"], found["path"].name
    log_file = root / "logs" / preset.lineage / LOG
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


def _beginning_line(preset: PresetBase, root: Path) -> str:
    """What a lineage without a checkpoint begins with."""
    if preset.init_from is None:
        published = getattr(preset.model, "published", None)
        return f"starts from the published weights of {published}" if published else "starts fresh"
    try:
        return f"starts from the weights of {preview_weights(preset.init_from, root)}"
    except UserError as error:
        return f"cannot start yet: {error}"


def _time_line(preset: PresetBase, runtime: Runtime, root: Path) -> str:
    """How long a run takes, when this machine has trained the preset before."""
    card = read_card(root / "logs" / preset.lineage)
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
