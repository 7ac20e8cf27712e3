"""A whole zip with wrong content is no checkpoint: it is set aside like a damaged one, and the next
older slot is taken."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.checkpoint.slots import CheckpointStore
from core.checkpoint.state import problem_of
from core.checkpoint.weights import preview_weights, read_weights
from core.errors import UserError
from tests.project import tiny_preset, train_here

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lineage with two slots, as the program writes them: heads, adaptive weights, a trained
    tokenizer."""
    root = tmp_path_factory.mktemp("trained")
    train_here(
        tiny_preset(
            tokenizer={"type": "bpe", "vocab_size": 300},
            train={"checkpoint_every_steps": 3},
            auxiliary={
                "enable_value": True,
                "enable_adaptive_sources": True,
                "adaptive_interval_tokens": 300,
            },
            data={"mix_strategy": "weighted", "source_weights": [1]},
        ),
        root,
    )
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "root")
    return tmp_path / "root"


def put(*path: str, value: Any) -> Change:
    """A change of one value; of "x" as it stands, where `value` is a function."""

    def change(state: dict[str, Any]) -> dict[str, Any]:
        node = state
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value(node[path[-1]]) if callable(value) else value
        return state

    return change


def without(*path: str) -> Change:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        node = state
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]
        return state

    return change


def of_sgd(state: dict[str, Any]) -> dict[str, Any]:
    return {
        **state,
        "optimizer": {
            name: {"square_avg": each["exp_avg"]} for name, each in state["optimizer"].items()
        },
    }


def of_torch(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "optimizer": {"state": {0: {"step": 1.0}}, "param_groups": []}}


def of_a_longer_run(state: dict[str, Any]) -> dict[str, Any]:
    for entry in state["optimizer"].values():
        entry["step"] = torch.tensor(300.0)
    return state


def of_another_model(state: dict[str, Any]) -> dict[str, Any]:
    return {
        **state,
        "optimizer": {f"block.{name}": each for name, each in state["optimizer"].items()},
    }


def of_another_size(state: dict[str, Any]) -> dict[str, Any]:
    state["optimizer"]["embedding.weight"]["exp_avg"] = torch.zeros(7, 7)
    return state


def nested(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(tensor.detach()))


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor.detach(), 0.1, 0, torch.qint8)


def moments(change: Callable[[torch.Tensor], Any]) -> Change:
    """A change of one moment that the optimizer keeps."""
    return put("optimizer", "embedding.weight", "exp_avg", value=change)


WRONG: dict[str, tuple[Change, str]] = {
    "only the model": (lambda state: {"model": state["model"]}, "heads: field required"),
    "nothing": (lambda state: {}, "model: field required"),
    "a list": (lambda state: [state["model"]], "it is ["),
    "no tensors": (put("model", value={"a": 1}), "model.a is 1"),
    "no progress": (without("progress"), "progress: field required"),
    "progress a list": (put("progress", value=[5]), "progress is [5]"),
    "not told whether finished": (
        without("progress", "finished"),
        "progress.finished: field required",
    ),
    "a step below zero": (put("progress", "step", value=-5), "progress.step is -5"),
    "a huge step": (
        put("progress", "step", value=10**9),
        "progress.step is 1000000000, rng.step 5",
    ),
    "huge steps": (
        lambda state: put("rng", "step", value=10**9)(put("progress", "step", value=10**9)(state)),
        "progress.step is 1000000000, more than progress.tokens",
    ),
    "a step of text": (put("progress", "step", value="5"), "progress.step is '5'"),
    "a step and a half": (put("progress", "step", value=5.5), "progress.step is 5.5"),
    "tokens of more bits than 64": (
        put("progress", "tokens", value=10**30),
        "progress.tokens is 1",
    ),
    "a run that is none": (put("progress", "run", value=0), "progress.run is 0"),
    "a fraction that is none": (
        put("progress", "fraction", value=float("nan")),
        "progress.fraction is nan",
    ),
    "more of a run than of a life": (
        put("progress", "run_step", value=6),
        "progress.run_step is 6, more than progress.step",
    ),
    "no data": (without("data"), "data: field required"),
    "data of text": (put("data", value="texts"), "data is 'texts'"),
    "empty data": (put("data", value={}), "data.rows: field required"),
    "rows of text": (put("data", "rows", value="20"), "data.rows is '20'"),
    "lanes in a list": (put("data", "lanes", value=[]), "data.lanes is []"),
    "lanes without numbers": (put("data", "lanes", value={"x": [1, []]}), "data.lanes.x"),
    "a lane that is nowhere": (
        put("data", "lanes", "0", value=[1]),
        "data.lanes.0.1: field required",
    ),
    "a snapshot of nothing": (
        put("data", "snapshot", value={}),
        "data.snapshot.index: field required",
    ),
    "held out a number": (put("data", "held_out", value=3), "data.held_out is 3"),
    "no tokenizer": (without("tokenizer"), "tokenizer: field required"),
    "a tokenizer of nothing": (put("tokenizer", value=None), "tokenizer is None"),
    "a tokenizer that is none": (
        put("tokenizer", "json", value="{}"),
        "tokenizer.json is '{}': is no tokenizer",
    ),
    "a tokenizer nested too deeply": (
        put("tokenizer", "json", value="[" * 99_999),
        "is no tokenizer",
    ),
    "a tokenizer that is no JSON": (put("tokenizer", "json", value="?"), "tokenizer.json is '?'"),
    "tokens of an epoch in text": (
        put("data", "epoch_tokens", value="9"),
        "data.epoch_tokens is '9'",
    ),
    "no preset": (without("preset"), "preset: field required"),
    "an empty preset": (put("preset", value={}), "preset.name: field required"),
    "a preset without a model": (without("preset", "model"), "preset.model: field required"),
    "adaptive weights of text": (put("adaptive", "factors", value="x"), "adaptive.factors is 'x'"),
    "format 2, in text": (put("format", value="2"), "format is '2'"),
    "another optimizer's": (of_sgd, "square_avg: another optimizer's"),
    "torch's own form": (of_torch, "optimizer."),
    "of a longer run": (of_a_longer_run, ".step is 300, progress.step 5"),
    "of another model": (of_another_model, "no parameter has this name"),
    "of another size": (of_another_size, "another shape than its parameter"),
    "a moment of one number": (
        moments(lambda tensor: torch.zeros(())),
        "another shape than its parameter",
    ),
    "a moment that is no tensor": (moments(lambda tensor: 1.0), "another shape than its parameter"),
    "a sparse moment": (moments(torch.Tensor.to_sparse), "exp_avg is sparse"),
    "a moment of whole numbers": (
        moments(torch.Tensor.long),
        "exp_avg is torch.int64, not floating-point",
    ),
    "a step of three numbers": (
        put("optimizer", "embedding.weight", "step", value=torch.ones(3)),
        "step is 3 numbers",
    ),
    "a step that is no number": (
        put("optimizer", "embedding.weight", "step", value=float("nan")),
        "step is nan",
    ),
    "a step without content": (
        put("optimizer", "embedding.weight", "step", value=torch.ones((), device="meta")),
        "device meta",
    ),
    "sparse weights": (
        put("model", "embedding.weight", value=torch.Tensor.to_sparse),
        "model.embedding.weight is sparse",
    ),
    "weights in nested rows": (
        put("model", "embedding.weight", value=nested),
        "is sparse, nested or quantized",
    ),
    "weights without content": (
        put("model", "embedding.weight", value=lambda t: t.to("meta")),
        "no content here (device meta)",
    ),
    "quantized weights": (
        put("model", "embedding.weight", value=quantized),
        "is sparse, nested or quantized",
    ),
    "weights of whole numbers": (
        put("model", "embedding.weight", value=torch.Tensor.long),
        "is torch.int64, and it is trained",
    ),
    "complex weights": (
        put("model", "embedding.weight", value=lambda t: t.to(torch.complex64)),
        "is complex",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_content_is_set_aside_and_the_older_slot_taken(wrong: str, root: Path) -> None:
    change, told = WRONG[wrong]
    store = CheckpointStore(root / "checkpoints", "t")
    path = store.slots[0]
    torch.save(change(torch.load(path, weights_only=True)), path)
    assert told in str(problem_of(torch.load(path, weights_only=True)))
    assert (peeked := store.peek()) is not None and peeked["path"] == store.slots[1], (
        "the menu tells of the slot that is taken"
    )
    state, taken, notes = store.load()
    assert state is not None and taken == store.slots[1] and state["progress"]["step"] == 3
    assert (
        len(notes) == 1
        and "it is now t_current.pth.damaged, and an older slot is taken" in notes[0]
    )


def test_a_run_goes_on_from_the_older_slot(root: Path) -> None:
    """Through the whole start: no traceback, no fresh start, nothing lost."""
    path = root / "checkpoints" / "t_current.pth"
    torch.save({"model": torch.load(path, weights_only=True)["model"]}, path)
    settings = torch.load(root / "checkpoints" / "t_prev.pth", weights_only=True)["preset"]
    events = train_here(settings, root)
    assert any(
        "t_current.pth is damaged (heads: field required)" in note
        for e in events
        for note in e.get("notes", [])
    )
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5]


def test_what_the_program_writes_and_wrote_is_whole(trained: Path) -> None:
    """Every checkpoint of today; and those of versions that did not keep all of it yet."""
    for path in (trained / "checkpoints").glob("*.pth"):
        state = torch.load(path, weights_only=True)
        assert problem_of(state) is None
    for key in ("adaptive", "init_from", "wandb_id", "compile_from_step", "format"):
        assert problem_of({k: v for k, v in state.items() if k != key}) is None, key
    for key in ("contents", "epoch_tokens", "held_out", "draws", "factors"):
        assert problem_of(without("data", key)({**state, "data": {**state["data"]}})) is None, key
    old = {
        key: value for key, value in state["progress"].items() if key not in ("ledger", "fraction")
    }
    assert problem_of({**state, "progress": {**old, "source_tokens": {"texts": 640}}}) is None
    assert (
        problem_of({**state, "of a newer version": 1, "progress": {**state["progress"], "more": 1}})
        is None
    )


@pytest.mark.parametrize("stand_in", ["pipe", "folder", "device", "dangling"])
def test_what_is_no_file_hangs_nobody(stand_in: str, root: Path) -> None:
    """A pipe, a folder, a device in place of a slot, or of weights that `init_from` names."""
    store = CheckpointStore(root / "checkpoints", "t")
    path = store.slots[0]
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "dangling": lambda: path.symlink_to("nowhere"),
    }[stand_in]()
    assert store.peek() is not None and preview_weights("t", root) == "t_prev.pth, step 3"
    with pytest.raises(Exception, match="does not exist"):
        read_weights(path, "checkpoints/t_current.pth")
    store.prepare()
    state, taken, _ = store.load()
    assert state is not None and taken == store.slots[1]
    store.save(state)
    store.wait()
    assert store.outcome() is not None and store.load()[1] == path


def test_weights_of_another_kind_are_refused_and_those_that_are_not_finite_told(root: Path) -> None:
    """Copied, whole numbers would be other weights, without a word; so from a file as from a
    lineage."""
    own = torch.nn.Linear(2, 2, bias=False)
    path = root / "w.pth"
    for odd in (
        torch.ones(2, 2).long(),
        torch.ones(2, 2).to(torch.complex64),
        torch.ones(2, 2).to_sparse(),
    ):
        torch.save({"weight": odd}, path)
        with pytest.raises(UserError, match=r"w\.pth: weight is .*Save it anew"):
            read_weights(path, "w.pth").load_into(own)
    torch.save({"weight": torch.tensor([[1.0, float("inf")], [0.0, 0.0]])}, path)
    (note,) = read_weights(path, "w.pth").load_into(own)
    assert note.startswith("not finite in w.pth: weight:")
