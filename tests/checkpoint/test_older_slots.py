"""A slot that an older version wrote goes on as that version would have gone on.

tests/golden/slot holds a run of eight steps, stopped after four, as commit 6cb46f9 wrote it, and
the numbers that the same commit measured when it went on.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.project import Project
from tests.training.runs import finish, session

SLOT = Path(__file__).resolve().parents[1] / "golden" / "slot"
EXPECTED = json.loads((SLOT / "expected.json").read_text())


def test_a_slot_of_an_older_version_goes_on(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(SLOT / "t_current.pth", tmp_path / "checkpoints")
    built = session(tmp_path, **EXPECTED["settings"])
    assert built.trainer.progress.step == 4
    old = torch.load(SLOT / "t_current.pth", weights_only=True)
    for name, weight in built.trainer.model.state_dict().items():
        assert torch.equal(weight, old["model"][name]), name
    assert finish(built) == "max_steps"
    for kind, expected in (("step", EXPECTED["steps"][4:]), ("eval", EXPECTED["evals"])):
        found = Project(tmp_path).events(kind)[-len(expected) :]
        assert [event["step"] for event in found] == [event["step"] for event in expected]
        for event, numbers in zip(found, expected):
            assert {key: event[key] for key in numbers} == pytest.approx(numbers, rel=1e-5)


def test_a_slot_written_now_has_every_key_of_the_older_one(tmp_path: Path) -> None:
    """So that the older version, too, can go on from it."""
    built = session(tmp_path, **EXPECTED["settings"])
    finish(built)
    old = torch.load(SLOT / "t_current.pth", weights_only=True)
    new = torch.load(tmp_path / "checkpoints" / "t_current.pth", weights_only=True)
    assert new.keys() >= old.keys()
    for section in ("progress", "data", "rng", "tokenizer"):
        assert new[section].keys() >= old[section].keys(), section
