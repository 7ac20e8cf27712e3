"""From a bare process to a running job: rank 0 asks for a preset, the other ranks listen.

In:    standard input (a terminal, or one line naming a preset), torchrun's variables, .env,
       configs/*.json
Out:   the chosen preset's job, run on every rank
State: none
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed import (  # type: ignore[attr-defined]  # torch does not declare these
    PrefixStore,
    TCPStore,
)

from core.environment import read_dotenv
from core.errors import Interrupted, PresetError, UserError
from core.file_names import shares_name, slot_name
from core.jobs import JOBS
from core.metrics.events import LOG
from core.parallel.processes import Processes
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

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

ROOT = Path(__file__).resolve().parent.parent
DEFAULT, SCHEMA = "00_best_general", "preset.schema.json"
PATIENCE = timedelta(days=7)
"""Time that the other ranks wait for a person at the menu."""


def launch(started: float) -> None:
    """Ask for a preset and run its job. Raises UserError, Interrupted or KeyboardInterrupt; every
    rank ends with the same outcome.

    started   time.time() when the program began
    """
    runtime = detect_runtime()
    prepare(runtime)
    # on every rank, and before any library looks for a token
    for note in read_dotenv(ROOT / ".env"):
        if runtime.rank == 0:
            tell(note)
    if runtime.world_size == 1:
        return _run_until_one_starts(runtime, started)
    store = rendezvous_store()
    preset = _agree_on_preset(runtime, store)
    if preset is None:  # rank 0 has said why
        sys.exit(2)
    parallel = Processes(runtime.device, store, runtime.rank, runtime.world_size)
    try:
        JOBS[preset.job].run(preset, runtime, parallel, ROOT, started, sys.stdout)
    except UserError as error:
        # at once: torchrun ends all ranks soon after the first has ended
        if not _is_told(store, str(error)):
            tell(f"\n{error}")
        sys.exit(error.exit_code)
    finally:
        parallel.close()


def _is_told(store: "Store", message: str) -> bool:
    """Return whether another rank tells this message: what stops all of them is told once."""
    digest = hashlib.blake2b(message.encode(errors="replace"), digest_size=8).hexdigest()
    try:
        return store.add(f"zeroarg/told/{digest}", 1) > 1
    except RuntimeError:  # the others are gone
        return False


def _run_until_one_starts(runtime: Runtime, started: float) -> None:
    """Run the chosen preset. If it is refused before it has done anything, show the menu again,
    where there is one."""
    refused: Refused | None = None
    while True:
        stem, preset = _ask(runtime, refused)
        before = _files_of(preset)
        try:
            _offer_fresh(preset)
            return JOBS[preset.job].run(preset, runtime, Single(), ROOT, started, sys.stdout)
        except UserError as error:
            if isinstance(error, Interrupted) or not can_pick() or _files_of(preset) != before:
                raise
            tell(f"\n{error}")
            refused, started = Refused(stem, str(error)), time.time()


def _files_of(preset: PresetBase) -> dict[Path, int]:
    """Return the files that runs of a preset have left, and when each was last written."""
    checkpoints, job = ROOT / "checkpoints", JOBS[preset.job]
    files = [
        *checkpoints.glob(slot_name(preset.lineage, "*")),
        *checkpoints.glob(f"{shares_name(preset.lineage, '*')}/*"),
        *(checkpoints / preset.lineage).rglob("*.pth"),
    ]
    files += (ROOT / "logs" / preset.lineage).rglob(LOG)
    files += job.files(preset, ROOT) if job.files is not None else []
    return {path: path.stat().st_mtime_ns for path in files if path.is_file()}


def _agree_on_preset(runtime: Runtime, store: "Store") -> PresetBase | None:
    """Ask on rank 0 and return its preset on every rank; None where rank 0 has failed. The preset
    travels as JSON through the rendezvous store, so no process group's timeout is running yet."""
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
    if not text:
        return None
    return decode_preset(json.loads(text), Preset, "the preset from rank 0", "preset")


def rendezvous_store() -> "Store":
    """Open torchrun's rendezvous store; no process group, and so no watchdog. Raises UserError."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = not agent_has_it and os.environ["RANK"] == "0"
    try:
        world_size, timeout = int(os.environ["WORLD_SIZE"]), timedelta(minutes=5)
        tcp_store = TCPStore(address, port, world_size, is_host, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes cannot meet at {address}:{port} (MASTER_ADDR, MASTER_PORT): "
            f"{str(error).splitlines()[0][:200]}. Start all of them, with the address of the "
            "machine that has RANK 0, and a port that is free there."
        ) from None
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    store = PrefixStore(f"zeroarg/{restart}", tcp_store)
    store.set_timeout(PATIENCE)
    return store


@dataclass(frozen=True)
class Refused:
    """A preset that was chosen and could not start."""

    stem: str
    reason: str  # empty where the menu knows it


def _ask(runtime: Runtime, refused: Refused | None = None) -> tuple[str, PresetBase]:
    """Return file stem and preset that a person, or the first line of standard input, chooses.
    Raises UserError, and KeyboardInterrupt when the user leaves the menu."""
    while True:
        presets, cards = _read_presets(runtime)
        default = DEFAULT
        if refused is not None:
            default = refused.stem
            for card in cards:
                card.refusal = refused.reason if card.stem == default else ""
        stem = choose(cards, default)
        if stem in presets:
            return stem, presets[stem]
        refused = Refused(stem, "")  # the file has a problem; it may have been mended meanwhile


def _offer_fresh(preset: PresetBase) -> None:
    """Ask whether to resume or to start fresh, if the chosen preset has been trained before."""
    if JOBS[preset.job].trains:
        offer_fresh(ROOT, preset.lineage, lambda: standing_lines(preset, ROOT))


def _read_presets(runtime: Runtime) -> tuple[dict[str, PresetBase], list[PresetCard]]:
    """Return every preset that can be read, by its stem, and a card for each file. Raises UserError
    where there is no file."""
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
            problem = str(error)
            if not isinstance(error, PresetError):
                problem = f"{path} cannot be read: {type(error).__name__}: {error}"
            cards.append(PresetCard(path.stem, NO_GROUP, path.stem, "", problem=problem))
        else:
            presets[path.stem] = preset
            cards.append(preset_card(path.stem, preset, runtime, ROOT))
    return presets, cards
