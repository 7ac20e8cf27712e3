"""Steps in which no token is learned: passed over and counted; refused where they do not end."""

import json
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from core.data.pipeline import Dealer
from core.data.unlearned import Unlearned
from core.errors import UserError
from tests.project import Project, differences, tiny_preset, train_here
from tests.training.runs import finish, session, slot, warnings_of

YES = {"role": "assistant", "content": "Yes."}


def write_chats(root: Path, learned: Collection[int], count: int = 40) -> dict[str, Any]:
    """Rows of one conversation each, most of them longer than a row before the assistant says a
    word."""
    texts = [
        f"Hi {i}. " if i in learned else f"{i} " + "Listen to me. " * 100 for i in range(count)
    ]
    chats = [{"messages": [{"role": "user", "content": text}, YES]} for text in texts]
    root.mkdir(parents=True, exist_ok=True)
    (root / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    data = {
        "sources": [{"type": "chat", "path": "chats.jsonl"}],
        "packing": "padding",
        "lanes": 4,
        "min_text_length": 1,
    }
    return {"model": {"seq_length": 96}, "data": data}


def test_a_step_that_teaches_nothing_is_passed_over_and_counted(tmp_path: Path) -> None:
    """Case 02: the run goes on, says so once with an example, and a stop in between changes
    nothing."""
    train = {"max_steps": 6, "per_gpu_batch_size": 1}
    for name, stops in (("straight", (99,)), ("stopped", (2, 3, 99))):
        for stop_at in stops:
            root, built = tmp_path / name, []
            changes = write_chats(root, range(0, 40, 5)) | {
                "train": train,
                "tokenizer": {"type": "byte"},
            }
            built.append(
                session(root, lambda: built[0].trainer.progress.step >= stop_at, **changes)  # noqa: B023
            )
            finish(built[0])
    one, other = Project(tmp_path / "straight"), Project(tmp_path / "stopped")
    assert one.steps() == list(range(1, 7)) == other.steps()
    assert differences(one.checkpoint(), other.checkpoint()) == []
    passed_over = [event["passed_over"] for event in one.events("step")]
    assert passed_over == sorted(passed_over) and passed_over[-1] > 6
    saved, dealer = one.checkpoint(), Dealer(4, 42)
    begun = [
        dealer.lane(i) == int(lane)
        for lane, (following, _) in saved["data"]["lanes"].items()
        for i in range(following)
    ]
    ledger = saved["progress"]["ledger"]["chats"]
    assert (ledger["documents"], ledger["epochs"]) == (sum(begun), 1)
    assert one.events("run_end")[-1]["ledger"]["chats"] == ledger
    (warning,) = warnings_of(tmp_path / "straight")
    assert "no token of it is learned" in warning
    assert "Listen to m" in warning and "[[Yes" not in warning


def test_data_that_teaches_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an example; before the first update nothing is saved, after it everything is."""
    monkeypatch.setattr("core.data.unlearned.MOST_TOKENS", 500)
    monkeypatch.setattr("core.data.unlearned.MOST_STEPS", 5)
    for name, learned in (("never", range(0)), ("first", [i for i in range(40) if i % 4])):
        with pytest.raises(
            UserError, match=r"no token of 5 steps in a row, [0-9,]+ tokens, is learned"
        ) as raised:
            train_here(
                tiny_preset(**write_chats(tmp_path / name, learned), train={"max_steps": 50}),
                tmp_path / name,
            )
        assert "Listen to m" in str(raised.value) and "[[Yes" not in str(raised.value)
    assert slot(tmp_path / "never") is None
    assert slot(tmp_path / "first")["step"] == Project(tmp_path / "first").steps()[-1] > 0


def test_where_all_of_the_data_teaches_nothing_its_end_is_no_end_of_a_run() -> None:
    for learned, of_chance in ((False, False), (True, False), (False, True)):
        passed = Unlearned(learned, of_chance)
        passed.add(100)
        refused = pytest.raises(UserError, match="no token of 1 steps")
        with nullcontext() if learned or of_chance else refused:
            passed.end()
