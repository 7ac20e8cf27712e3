"""Starting from other weights, and loading a trained model: which file is taken, what comes along,
what starts afresh."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from core.assembly.session import TrainingSession, build_training
from core.checkpoint.slots import FORMAT
from core.checkpoint.weights import find_weights, preview_weights
from core.errors import CheckpointError, PresetError, UserError
from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.preview import preset_card
from core.registry import Preset
from core.runtime import detect_runtime
from tests.checkpoint.conftest import SOURCE
from tests.project import merged, train_here

pytestmark = pytest.mark.usefixtures("no_plots")


def source_state(root: Path) -> dict[str, Any]:
    return torch.load(root / "checkpoints" / "t_current.pth", weights_only=True)


def assembled(root: Path, preset: dict, stem: str = "b") -> TrainingSession:
    """Everything up to the first step."""
    decoded = decode_preset(preset, Preset, stem, stem)
    session = build_training(
        decoded, detect_runtime(), Single(), root, lambda *_: [], lambda: False
    )
    session.trainer.loader.close()
    session.log.close()
    return session


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# files that others may have written ---------------------------------------------------------------


def short_keys(state: dict, path: Path) -> None:
    """What PolychromaticLM's portable checkpoints hold on disk."""
    torch.save(
        {
            "model": state["model"],
            "optimizer": {"state": {}},
            "scheduler": {"last_epoch": 7},
            "step": 7,
            "tau": 0.55,
        },
        path,
    )


def long_keys(state: dict, path: Path) -> None:
    """What its specification says they hold."""
    rest = {
        "optimizer_state_dict": {"state": {}},
        "scheduler_state_dict": {},
        "step": 7,
        "tau": 0.55,
    }
    torch.save({"model_state_dict": state["model"], **rest}, path)


def wrapped(state: dict, path: Path) -> None:
    torch.save({f"module._orig_mod.{name}": value for name, value in state["model"].items()}, path)


def before_zip_files(state: dict, path: Path) -> None:
    torch.save(state["model"], path, _use_new_zipfile_serialization=False)


def safetensors(state: dict, path: Path) -> None:
    """Tied weights are kept once there: the readout's has no entry."""
    save_file(
        {
            name: value.contiguous()
            for name, value in state["model"].items()
            if name != "lm_head.weight"
        },
        path,
    )


def our_own(state: dict, path: Path) -> None:
    torch.save(state, path)


FILES: dict[str, tuple[Callable, str, str]] = {
    "short keys": (short_keys, "portable_final.pt", ", step 7"),
    "long keys": (long_keys, "portable_final.pt", ", step 7"),
    "wrapped": (wrapped, "model.pth", ""),
    "an old format of torch": (before_zip_files, "model.pt", ""),
    "safetensors": (safetensors, "model.safetensors", ""),
    "ours": (our_own, "mine.pth", ", step 3"),
}


@pytest.mark.parametrize("kind", FILES)
def test_from_a_file(kind: str, root: Path) -> None:
    """Bit for bit the file's weights; everything else as in a new lineage, and told."""
    write, name, step = FILES[kind]
    (root / "weights").mkdir()
    write(source_state(root), root / "weights" / name)
    session = assembled(root, merged(SOURCE, {"init_from": f"./weights/{name}"}))
    trainer = session.trainer
    assert same(trainer.model.state_dict(), source_state(root)["model"])
    assert (
        f"weights from ./weights/{name}{step}; optimizer and schedules start afresh"
        in session.notes
    )
    assert preview_weights(f"./weights/{name}", root) in (
        f"./weights/{name}{step}",
        f"./weights/{name}",
    )
    assert (trainer.progress.step, trainer.progress.tokens, trainer.progress.fraction) == (
        0,
        0,
        0.0,
    )
    assert all(not state for state in trainer.optimizer.state().values())
    assert (
        session.start_event["init_from"] == f"./weights/{name}{step}"
        and session.start_event["resumed_from"] is None
    )


def test_from_a_lineage(root: Path) -> None:
    """Its newest weights and its tokenizer. Its files stay as they are."""
    before = {path.name: path.read_bytes() for path in (root / "checkpoints").iterdir()}
    preset = merged(
        SOURCE,
        {
            "init_from": "t",
            "tokenizer": {"type": "bpe", "vocab_size": 300},
            "model": {"dropout": 0.5},
        },
    )
    session = assembled(root, preset)
    assert same(session.trainer.model.state_dict(), source_state(root)["model"])
    assert session.trainer.extra_state["tokenizer"] == source_state(root)["tokenizer"]
    assert (
        "weights from t_current.pth, step 3; optimizer and schedules start afresh" in session.notes
    )
    assert "the checkpoint's tokenizer is used; the preset's differs" in session.notes
    assert "they were made with other settings: model.dropout was 0.0, is 0.5" in session.notes
    assert {path.name: path.read_bytes() for path in (root / "checkpoints").iterdir()} == before


def test_the_model_makes_weights_fit(root: Path) -> None:
    """prepare_load is asked, as for a checkpoint: a position table may be shorter than the rows."""
    session = assembled(root, merged(SOURCE, {"init_from": "t", "model": {"seq_length": 48}}))
    assert "the position table grows from 32 to 48 rows" in session.notes
    own, table = (
        session.trainer.model.state_dict(),
        source_state(root)["model"]["pos_embedding.weight"],
    )
    assert torch.equal(own["pos_embedding.weight"][:32], table)


def test_the_lineage_goes_on_from_its_own_checkpoint(root: Path) -> None:
    """Once it has one, init_from is not used again; the weights it began with may be gone. A run
    knows what it began with."""
    preset = merged(SOURCE, {"init_from": "t", "name": "fine-tuned"})
    first = train_here(preset, root, "b")
    for path in (root / "checkpoints").glob("t_*"):
        path.unlink()
    again = train_here(preset, root, "b")[len(first) :]
    assert [event["step"] for event in again if event["event"] == "step"] == [4, 5, 6]
    told = 'init_from "t" is not used again: the lineage goes on from its own checkpoint'
    assert told in again[0]["notes"] and told not in first[0]["notes"]
    assert first[0]["init_from"] == again[0]["init_from"] == "t_current.pth, step 3"
    assert again[0]["resumed_from"] == "step 3"


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def test_a_damaged_slot_is_passed_over_and_left_alone(root: Path) -> None:
    """It is another lineage's: that one will judge it when it is started."""
    folder = root / "checkpoints"
    shutil.copy(folder / "t_current.pth", folder / "t_prev.pth")
    flip_a_bit(folder / "t_current.pth")
    session = assembled(root, merged(SOURCE, {"init_from": "t"}))
    assert (
        "t_current.pth is damaged (a checksum does not match), and an older slot is taken"
        in session.notes
    )
    assert "weights from t_prev.pth, step 3; optimizer and schedules start afresh" in session.notes
    flip_a_bit(folder / "t_prev.pth")
    with pytest.raises(
        UserError,
        match=r'no checkpoint of the lineage "t" can be read:\n  t_current.pth is damaged',
    ):
        assembled(root, merged(SOURCE, {"init_from": "t"}))
    with pytest.raises(UserError, match=r"checkpoints/t_prev\.pth is damaged"):
        find_weights("checkpoints/t_prev.pth", root)
    assert sorted(path.name for path in folder.iterdir()) == ["t_current.pth", "t_prev.pth"]


class Trap:
    """Unpickling this would create a file."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("sprung"),)


def test_what_is_not_there_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What exists, and what to do; nothing is written for the new lineage."""
    monkeypatch.chdir(root)
    (root / "configs").mkdir()
    (root / "configs" / "planned.json").write_text("{}")
    torch.save({"a": 1, "b": "c"}, root / "notes.pt")
    torch.save([1, 2], root / "list.pt")
    torch.save({"w": torch.zeros(1), "trap": Trap()}, root / "trap.pt")
    (root / "text.pt").write_text("no checkpoint at all")
    (root / "text.safetensors").write_text("no checkpoint at all")
    torch.save({**source_state(root), "format": FORMAT + 1}, root / "newer.pth")
    short_keys(source_state(root), root / "published.pt")
    wanted = {
        "nobody": r'nobody_current.pth is not there: run a preset of lineage "nobody" first. '
        r"There are checkpoints of t\.",
        "planned": r'checkpoints/planned_current.pth is not there: run the preset "planned" '
        r"first\.",
        "./no.pt": r"\./no\.pt does not exist. A path is relative to the folder of main\.py",
        "notes.pt": r"notes\.pt holds no weights that this program knows: a, b\.",
        "list.pt": r"list\.pt holds a list, not weights by name",
        "trap.pt": r"trap\.pt cannot be read as tensors and plain values.*save only the state dict",
        "text.pt": r"text\.pt cannot be read",
        "text.safetensors": r"text\.safetensors cannot be read",
        "newer.pth": f"has format {FORMAT + 1}, this program reads up to {FORMAT}",
    }
    for origin, told in wanted.items():
        with pytest.raises(UserError, match=told):
            assembled(root, merged(SOURCE, {"init_from": origin}))
    with pytest.raises(
        UserError, match=r'published\.pt has no tokenizer with it, and a "bpe" trained here'
    ):
        assembled(
            root,
            merged(
                SOURCE,
                {"init_from": "published.pt", "tokenizer": {"type": "bpe", "vocab_size": 300}},
            ),
        )
    assert not (root / "sprung").exists() and not list((root / "checkpoints").glob("b_*"))
    assert not (root / "logs" / "b").exists()


def test_weights_that_do_not_fit_are_named(root: Path) -> None:
    short_keys(source_state(root), root / "published.pt")
    with pytest.raises(CheckpointError) as error:
        assembled(
            root,
            merged(
                SOURCE, {"init_from": "published.pt", "model": {"hidden_size": 64, "num_layers": 1}}
            ),
        )
    told = str(error.value)
    assert told.startswith("the weights in published.pt do not fit this preset's model:")
    assert "embedding.weight is (257, 32) there, (257, 64) here" in told and "... and" in told
    assert (
        "Give the preset's model the settings they were made with, and their tokenizer; or name "
        "other weights." in told
    )


def test_a_lineage_does_not_start_from_itself() -> None:
    with pytest.raises(
        PresetError,
        match='init_from  "b" is its own lineage, which a preset goes on with anyway; leave it out',
    ):
        decode_preset(merged(SOURCE, {"init_from": "b"}), Preset, "b", "b")
    with pytest.raises(PresetError, match="init_from"):
        decode_preset(merged(SOURCE, {"init_from": ""}), Preset, "b", "b")


def test_the_menu_tells(root: Path) -> None:
    def told(**changes: Any) -> str:
        preset = decode_preset(merged(SOURCE, changes), Preset, "b", "b")
        return preset_card("2_b", preset, detect_runtime(), root).preview().splitlines()[-1]

    assert told(init_from="t") == "starts from the weights of t_current.pth, step 3"
    assert (
        told(init_from="./checkpoints/t_current.pth")
        == "starts from the weights of ./checkpoints/t_current.pth, step 3"
    )
    assert told(init_from="u").startswith(
        "cannot start yet: checkpoints/u_current.pth is not there: run a preset of lineage"
    )
    assert told() == "starts fresh"
    shutil.copy(root / "checkpoints" / "t_current.pth", root / "checkpoints" / "b_current.pth")
    assert told(init_from="t").startswith("starts run 2 from step 3 in b_current.pth")


# comparisons --------------------------------------------------------------------------------------
