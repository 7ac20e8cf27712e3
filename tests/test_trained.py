"""What a model was trained with beside itself is used when it speaks: drafts, a memory, a
planner."""

import re
from pathlib import Path

import pytest
import torch

from core.generation.engine import TextGenerator
from core.generation.engine import generate_text as sample
from core.heads.memory import Memory
from core.jobs import JOBS
from core.jobs.generate import open_session, run_command
from core.randomness import derive_seed
from core.runtime import detect_runtime
from core.trained import build_generator, load_trained
from core.ui.text import clean_lines
from tests.jobs.test_generate import TRAINED, piped, preset_of
from tests.project import merged, train_here


def shake_heads(root: Path, by: float) -> None:
    """As if they had learned a great deal."""
    path = root / "checkpoints" / "t_current.pth"
    state = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    state["heads"] = {
        name: each + by * torch.randn(each.shape, generator=generator)
        for name, each in state["heads"].items()
    }
    torch.save(state, path)


def test_a_model_with_a_draft_head_says_the_same_in_fewer_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told at the start and, with what came of it, at the end; /draft shortens it; "never"
    leaves it out."""
    train_here(merged(TRAINED, {"auxiliary": {"enable_draft": True, "draft_tokens": 3}}), tmp_path)
    drafted = piped(tmp_path, monkeypatch, "In year\nThe\n")
    plain = piped(tmp_path, monkeypatch, "In year\nThe\n", generate={"draft": "never"})
    assert (
        drafted[1] == "continues what you type; drafts up to 3 tokens at a time, and verifies them"
    )
    assert drafted[2:-1] == plain[2:]
    assert re.fullmatch(
        r"drafts: \d+ of \d+ guesses were right \(\d+%\); [\d.]+ tokens a pass of the model",
        drafted[-1],
    )
    session = open_session(load_trained(preset_of(), tmp_path, detect_runtime()))
    text = "".join(session.answer("In year"))
    drafter = session._generator.drafter
    assert drafter.proposed > 0 and drafter.emitted > 0
    assert run_command(session, "/draft") == "draft is 3; /draft takes a whole number from 0 up"
    assert (
        run_command(session, "/draft -1")
        == '/draft takes a whole number from 0 up, not "-1"; it stays 3'
    )
    assert run_command(session, "/draft 0") == "draft is 0 now" and "/draft 2" in run_command(
        session, "/help"
    )
    before = drafter.proposed
    run_command(session, "/seed 42")
    assert "".join(session.answer("In year")) == text and drafter.proposed == before


def test_a_memory_is_used_where_the_model_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first lines say so. Answers that fit into the context are the same as without, and a
    conversation is kept whole."""
    train_here(
        merged(TRAINED, {"auxiliary": {"enable_memory": True, "memory_tokens_after": 4}}), tmp_path
    )
    compressed: list[int] = []
    compress = Memory.compress
    monkeypatch.setattr(
        Memory, "compress", lambda *args: compressed.append(args[2].shape[1]) or compress(*args)
    )
    said = []
    for memory in (True, False):
        for prompt in ("In year", "In year 31 the river of stone met the sea"):
            told = piped(tmp_path, monkeypatch, f"{prompt}\n", generate={"memory": memory})
            assert (
                told[1]
                == "continues what you type"
                + "; what no longer fits is remembered in a summary" * memory
            )
            said.append((told[2:], compressed.copy()))
            compressed.clear()
    short, long, plain, cropped = said
    assert short == plain and short[1] == cropped[1] == [] and set(long[1]) == {16}
    trained = load_trained(preset_of(generate={"chat": "always"}), tmp_path, detect_runtime())
    session = open_session(trained)
    texts = [list(session.answer(f"question {number}")) for number in range(3)]
    assert len(texts) == 3 and "question 0" in trained.tokenizer.decode(session._fitting_ids())


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose lineage "t" has a planner that has learned a great deal."""
    root = tmp_path_factory.mktemp("planned")
    heads = ("policy", "value", "rollouts", "planner")
    train_here(merged(TRAINED, {"auxiliary": {f"enable_{head}": True for head in heads}}), root)
    shake_heads(root, 5.0)
    return root


def test_a_planner_guides_where_the_preset_says_so(
    planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said in the first lines, and switched by a command; off, the text is the model's own."""
    trained = load_trained(preset_of(), planned, detect_runtime())
    number = 1  # of a text that does not end at once
    seed = derive_seed(42, "generate", number)
    own, guided = (
        sample(
            TextGenerator(trained.model, trained.tokenizer, 32, guide),
            "In year",
            trained.preset.generate,
            seed,
        )  # type: ignore[arg-type]
        for guide in (None, build_generator(trained).planner)
    )
    assert own != guided
    for on, text in ((False, own), (True, guided)):
        session = open_session(
            load_trained(preset_of(generate={"planner": on}), planned, detect_runtime())
        )
        assert ("its planner weighs 8 tokens, 3 steps ahead" in session.description) == on
        assert "".join(session.answer_prompt("In year", number)) == text
    for line, said, text in (
        ("/planner", "planner is on; /planner takes on or off", guided),
        ("/planner off", "planner is off now", own),
        ("/planner maybe", '/planner takes on or off, not "maybe"; it stays off', own),
        ("/planner on", "planner is on now", guided),
    ):
        assert (
            run_command(session, line) == said
            and "".join(session.answer_prompt("In year", number)) == text
        )
    assert "/planner on" in run_command(session, "/help")
    lines = piped(planned, monkeypatch, "The\nIn year\n", generate={"planner": True})
    assert lines[1].startswith("continues what you type; its planner")
    assert "\n".join(lines).endswith(f"> In year\n{clean_lines(guided).strip()}")
    assert (
        JOBS["generate"]
        .preview(preset_of(generate={"planner": True}), planned)[1]
        .endswith(", by its planner")
    )
