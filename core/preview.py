"""The menu's preview of a preset: what a run of it would be, where it would start, how long it
would take.

In:    a preset, the runtime, the project's root folder; checkpoints, logs and run.json, read only
Out:   a PresetCard for the menu, and the lines of its preview
State: none; nothing is built, downloaded or written
"""

from collections.abc import Callable
from pathlib import Path

import torch

from core.assembly.start import next_action
from core.checkpoint.lineage import changed_sources
from core.checkpoint.slots import label, store_of
from core.checkpoint.weights import preview_weights
from core.contracts import call_if_defined
from core.data.tokenizer_build import KNOWN_VOCABULARIES, tokenizer_facts
from core.errors import UserError
from core.files import own_path
from core.jobs import JOBS
from core.metrics.events import LOG, evaluation_is_missing
from core.preset.base import PresetBase
from core.preset.settings import RUN_TOKENS, TokenizerSettings
from core.reports.run_card import is_positive, read_card
from core.runtime import Runtime
from core.training.memory import check_memory, memory_estimate, size_of
from core.ui.menu import PresetCard
from core.ui.text import count

NO_GROUP = "Your own"
"""Heading in the menu of presets without a `group`."""
LARGE = 100_000_000
"""Number of parameters from which on the menu says which GPUs a model fits."""
GPU_GIGABYTES, USABLE = (24, 80, 141), 0.92
"""Memory of common GPUs, and the share of it that a program gets."""
SAME_LENGTH = 0.05
"""Relative difference up to which two runs count as equally long: the last step passes the end."""
GPT2_VOCABULARY = 50_257


def preset_card(stem: str, preset: PresetBase, runtime: Runtime, root: Path) -> PresetCard:
    """Return the menu's entry for a preset; its preview is worked out only when it is looked at."""
    train = preset.train
    limited = train.max_steps is not None or train.max_epochs is not None
    short = limited and JOBS[preset.job].trains
    description = " · ".join(part for part in ("short" * short, preset.description) if part)

    def preview() -> str:
        return "\n".join(preview_lines(preset, runtime, root))

    return PresetCard(stem, preset.group or NO_GROUP, preset.name, description, preview)


def preview_lines(preset: PresetBase, runtime: Runtime, root: Path) -> list[str]:
    """Return what a preset would do, in a few lines. A part that fails leaves the others as they
    are."""
    lines = []
    if JOBS[preset.job].trains:
        lines += _or_reason(lambda: training_lines(preset, runtime, root))
    lines += standing_lines(preset, root)
    if JOBS[preset.job].preview is None:
        lines[-1] += _or_reason(lambda: [time_remark(preset, runtime, root)])[0]
    return lines


def standing_lines(preset: PresetBase, root: Path) -> list[str]:
    """Return what a preset has done already and where it goes on."""
    job_preview = JOBS[preset.job].preview
    if job_preview is not None:
        return _or_reason(lambda: job_preview(preset, root))
    return _or_reason(lambda: resume_lines(preset, root))


def _or_reason(lines: Callable[[], list[str]]) -> list[str]:
    """Call `lines`; if that fails, return one line with the reason: the job itself will say what is
    wrong."""
    try:
        return lines()
    except Exception as error:
        return [f"cannot tell more: {type(error).__name__}: {error}".splitlines()[0][:300]]


# size ---------------------------------------------------------------------------------------------


def training_lines(preset: PresetBase, runtime: Runtime, root: Path) -> list[str]:
    """Return the size, length, data and machine of a run."""
    vocab_size = known_vocab_size(preset.tokenizer, root)
    train = preset.train
    try:
        model = size_of(preset, vocab_size)
        check_memory(preset, vocab_size, runtime)
    except UserError as error:
        return [f"cannot start yet: {str(error).splitlines()[0]}"]
    bf16 = runtime.compute_dtype(train.precision) == torch.bfloat16
    if model is None:  # a model of the Hub: the menu downloads nothing
        size, memory = call_if_defined(preset.model, "summary"), ""
    else:
        size = f"{count(model.parameters)} parameters"
        size += f" ({count(model.trained)} trained)" if model.trained < model.parameters else ""
        fixed, row = memory_estimate(preset, model, vocab_size, bf16)
        memory = f", about {(fixed + row * train.per_gpu_batch_size) / 2**30:.1f} GB of memory"
    rows = train.per_gpu_batch_size * train.accumulation_steps * runtime.world_size
    lines = [
        f"{size}, {_limits(preset)} in steps of {rows * preset.model.seq_length:,}",
        f"reads {', '.join(source.name for source in preset.data.sources)}",
        f"on {runtime.device_name}, {'bf16' if bf16 else 'fp32'}{memory}",
    ]
    if model is not None and model.parameters >= LARGE:
        fixed, row = memory_estimate(preset, model, vocab_size, bf16=True)
        lines.append(gpus_line(fixed, row, train.per_gpu_batch_size))
    return lines


def _limits(preset: PresetBase) -> str:
    """Return how long a preset trains, in words."""
    train = preset.train
    limits = f"at most {train.max_steps:,} steps" if train.max_steps else f"{RUN_TOKENS:,} tokens"
    if train.max_epochs:
        limits += f", at most {train.max_epochs} epoch{'s' if train.max_epochs > 1 else ''}"
    return limits + (f", {train.runs} runs" if train.runs > 1 else "")


def gpus_line(fixed: int, row: int, requested: int) -> str:
    """Say how large a micro-batch fits common GPUs.

    fixed, row   bytes that a model needs at any batch size, and for each row
    requested    rows of the preset's micro-batch
    """
    rows = {size: max(0, int((size * 2**30 * USABLE - fixed) // row)) for size in GPU_GIGABYTES}
    fits = ", ".join(f"{n or 'no'} row{'s' * (n != 1)} on {size} GB" for size, n in rows.items())
    return (
        f"micro-batches that fit a card in bf16: {fits}; the preset's {requested} take "
        f"{(fixed + row * requested) / 2**30:.0f} GB"
    )


def known_vocab_size(tokenizer: TokenizerSettings, root: Path) -> int:
    """Return the vocabulary of a preset's tokenizer; GPT-2's where only loading it would tell."""
    if tokenizer.type == "file":
        assert tokenizer.path is not None  # as its section demands
        return tokenizer_facts(own_path(tokenizer.path, root)).get("vocab_size", GPT2_VOCABULARY)
    if tokenizer.type == "hub":
        return KNOWN_VOCABULARIES.get(tokenizer.name or "", GPT2_VOCABULARY)
    return 257 if tokenizer.type == "byte" else tokenizer.vocab_size


# where it stands ----------------------------------------------------------------------------------


def resume_lines(preset: PresetBase, root: Path) -> list[str]:
    """Return where training would start, and which of the sources have changed since."""
    store = store_of(preset, root)
    newest = store.peek()
    if newest is None:
        return [_beginning_line(preset, root)]
    progress, slot = newest["progress"], label(newest["path"])
    log_file = root / "logs" / preset.lineage / LOG
    next_part = next_action(
        preset, newest, lambda: evaluation_is_missing(log_file, progress["step"])
    )
    if next_part == "evaluation":
        line = (
            f"evaluates run {progress['run']}, which was trained to its end, step "
            f"{progress['step']:,}, from {slot}"
        )
    elif next_part == "next run":
        line = f"starts run {progress['run'] + 1} from step {progress['step']:,} in {slot}"
    else:
        line = (
            f"resumes run {progress['run']} at step {progress['step']:,}, "
            f"{progress['run_tokens']:,} tokens, from {slot}"
        )
    return [*changed_sources(newest, preset), line]


def _beginning_line(preset: PresetBase, root: Path) -> str:
    """Return what a lineage without a checkpoint starts from."""
    if preset.init_from is None:
        published = getattr(preset.model, "published", None)
        return f"starts from the published weights of {published}" if published else "starts fresh"
    try:
        return f"starts from the weights of {preview_weights(preset.init_from, root)}"
    except UserError as error:
        return f"cannot start yet: {error}"


def time_remark(preset: PresetBase, runtime: Runtime, root: Path) -> str:
    """Return how long a run takes, if this machine has trained the preset before; "" if not."""
    card = read_card(root / "logs" / preset.lineage)
    trained_before = tuple(card.get(key) for key in ("preset", "device", "world_size"))
    if trained_before != (preset.name, runtime.device_name, runtime.world_size):
        return ""
    step_tokens, speed = card.get("tokens_per_step"), card.get("tokens_per_second")
    if not is_positive(step_tokens) or not is_positive(speed):
        return ""
    tokens: float = min(RUN_TOKENS, (preset.train.max_steps or RUN_TOKENS) * step_tokens)
    if preset.train.max_epochs and is_positive(end := card.get("end_tokens")):
        tokens = min(tokens, end)
    # the speed knows nothing of evaluations; a run that was whole does
    seconds, verb = tokens / speed, "would take"
    whole = card.get("whole_run")
    if isinstance(whole, dict):
        whole_seconds, whole_tokens = whole.get("seconds"), whole.get("tokens")
        if is_positive(whole_seconds) and is_positive(whole_tokens):
            seconds = whole_seconds * tokens / whole_tokens
            verb = "took" if abs(tokens / whole_tokens - 1) < SAME_LENGTH else verb
    minutes = seconds / 60
    length = f"{minutes / 60:.1f} h" if minutes > 90 else f"{max(minutes, 1):.0f} min"
    return f"; a run {verb} about {length} here"
