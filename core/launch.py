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
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from core.environment import read_dotenv
from core.errors import Interrupted, PresetError, UserError
from core.file_names import slot_name
from core.jobs import JOBS
from core.metrics.events import LOG
from core.parallel.ddp import DDP
from core.parallel.single import Single
from core.preset.base import PresetBase
from core.preset.decode import decode_preset, read_preset
from core.preset.merge import preset_json
from core.preview import NO_GROUP, preset_card, standing_lines
from core.registry import Preset
from core.runtime import Runtime, detect_runtime, prepare
from core.terminal import tell
from core.ui.menu import PresetCard, can_pick, choose
from core.ui.resume import offer_fresh

ROOT = Path(__file__).resolve().parent.parent
DEFAULT, SCHEMA = "00_best_general", "preset.schema.json"
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
        JOBS[preset.job].run(preset, runtime, parallel, ROOT, started, sys.stdout)
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
            return JOBS[preset.job].run(preset, runtime, Single(), ROOT, started, sys.stdout)
        except UserError as error:
            if isinstance(error, Interrupted) or not can_pick() or _work_of(preset) != before:
                raise
            tell(f"\n{error}")
            refused, started = (stem, str(error)), time.time()


def _work_of(preset: PresetBase) -> dict[Path, int]:
    """Return the files that runs of a preset have left, and when each was last written."""
    checkpoints, job = ROOT / "checkpoints", JOBS[preset.job]
    files = [
        *checkpoints.glob(slot_name(preset.lineage, "*")),
        *(checkpoints / preset.lineage).rglob("*.pth"),
    ]
    files += (ROOT / "logs" / preset.lineage).rglob(LOG)
    files += job.files(preset, ROOT) if job.files is not None else []
    return {path: path.stat().st_mtime_ns for path in files if path.is_file()}


def _agree_on_preset(runtime: Runtime, store: dist.Store) -> PresetBase | None:
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


def _store() -> dist.Store:
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


def _ask(runtime: Runtime, refused: tuple[str, str] | None = None) -> tuple[str, PresetBase]:
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


def _offer_fresh(preset: PresetBase) -> None:
    """Where the chosen preset would go on from a checkpoint, ask whether it shall."""
    if JOBS[preset.job].trains:
        offer_fresh(ROOT, preset.lineage, lambda: standing_lines(preset, ROOT))


def _read_presets(runtime: Runtime) -> tuple[dict[str, PresetBase], list[PresetCard]]:
    """Every preset that can be read, and a card for each file."""
    paths = [
        path
        for path in sorted((ROOT / "configs").glob("*.json"))
        if path.name[0] != "." and path.name != SCHEMA
    ]
    if not paths:
        raise UserError(f"there are no presets in {ROOT / 'configs'}")
    presets: dict[str, PresetBase] = {}
    cards = []
    for path in paths:
        try:
            preset = read_preset(path, Preset)
        except Exception as error:  # whatever is wrong with one file, the others can be chosen
            why = (
                str(error)
                if isinstance(error, PresetError)
                else f"{path} cannot be read: {type(error).__name__}: {error}"
            )
            cards.append(PresetCard(path.stem, NO_GROUP, path.stem, "", problem=why))
        else:
            presets[path.stem] = preset
            cards.append(preset_card(path.stem, preset, runtime, ROOT))
    return presets, cards
