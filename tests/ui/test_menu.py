"""The menu, in a real pseudo-terminal, and its stand-in for pipes."""

import io
import os
import subprocess
import sys
import time

import pexpect
import pytest

from core.errors import UserError
from core.ui.menu import PresetCard, choose

LOOKED_AT = []
"""The presets of MANY whose previews were asked for."""
CARDS = [
    PresetCard(
        "00_best_general",
        "Baseline",
        "Best general",
        "the default",
        lambda: "PREVIEW-A\nsecond line of A",
    ),
    PresetCard("10_harmonic", "Harmonic", "Harmonic", "another", lambda: "PREVIEW-B"),
    PresetCard("01_best_qa", "Baseline", "Best QA", "questions", lambda: "PREVIEW-C"),
    PresetCard(
        "20_broken",
        "Harmonic",
        "Broken",
        "",
        problem="20_broken.json has 1 problem\n  model.num_layer  unknown",
    ),
    PresetCard("90_quick", "Tests", "Quick", "the last", lambda: "PREVIEW-E"),
]


def looked_at(i):
    LOOKED_AT.append(f"{i:02}_preset")
    return f"PREVIEW-{i:02}"


MANY = [
    PresetCard(
        f"{i:02}_preset",
        f"Group {i // 6}",
        f"Preset {i:02}",
        f"SAYS-{i:02}",
        lambda i=i: looked_at(i),
    )
    for i in range(30)
]
HARD = [
    PresetCard("00_slow", "g", "Slow", "takes a minute", lambda: time.sleep(60) or "LATE"),
    PresetCard("01_fails", "g", "Fails", "has a fault", lambda: str(1 // 0)),
    PresetCard("02_fine", "g", "Fine", "works", lambda: "FINE"),
]
REFUSED = [PresetCard("00_refused", "g", "Refused", "says", refusal="no such file: x.txt"), *HARD]


def cards_for(default):
    """The list that a default stands in."""
    return next(
        cards for cards in (CARDS, MANY, HARD, REFUSED) if default in {card.stem for card in cards}
    )


SCRIPT = """
import sys
from core.errors import UserError
from core.ui.menu import choose
from tests.ui.test_menu import LOOKED_AT, cards_for
try:
    print("CHOSEN", choose(cards_for(sys.argv[1]), sys.argv[1]))
    print("LOOKED AT", LOOKED_AT) if LOOKED_AT else None
except UserError as error:
    print("ERROR", error)
    sys.exit(2)
except KeyboardInterrupt:
    print("LEFT")
    sys.exit(130)
"""
UP, DOWN = "\x1b[A", "\x1b[B"


@pytest.fixture
def menu(tmp_path):
    """Opens the menu in a terminal of 24 x 80 (or another size) and closes it afterwards."""
    script = tmp_path / "menu.py"
    script.write_text(SCRIPT)
    children = []

    def open_menu(default="00_best_general", rows=24, term="xterm-256color"):
        env = {**os.environ, "TERM": term, "PYTHONPATH": os.getcwd(), "PYTHONIOENCODING": "utf-8"}
        env.pop("COLUMNS", None), env.pop("LINES", None)
        child = pexpect.spawn(
            sys.executable,
            [str(script), default],
            dimensions=(rows, 80),
            encoding="utf-8",
            env=env,
            timeout=20,
        )
        children.append(child)
        return child

    yield open_menu
    for child in children:
        child.close(force=True)


def ends_with(child, output, status):
    child.expect_exact(output)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == status


def test_enter_alone_takes_the_default(menu):
    child = menu()
    child.expect_exact("PREVIEW-A")
    child.send("\r")
    ends_with(child, "CHOSEN 00_best_general", 0)


def test_a_default_in_the_middle_is_where_the_menu_opens(menu):
    child = menu("10_harmonic")
    child.expect_exact("PREVIEW-B")
    child.send("\r")
    ends_with(child, "CHOSEN 10_harmonic", 0)


def test_moving_changes_the_preview_and_enter_takes_it(menu):
    child = menu()
    child.expect_exact("second line of A")
    child.send(DOWN)  # the next of its group, though another group's card was given before it
    child.expect("(PREVIEW-)?C")  # only cells that change are drawn again
    child.send("\r")
    ends_with(child, "CHOSEN 01_best_qa", 0)


@pytest.mark.slow
def test_the_list_goes_round(menu):
    for start, key, end in (
        ("00_best_general", UP, "90_quick"),
        ("90_quick", DOWN, "00_best_general"),
    ):
        child = menu(start)
        child.expect_exact("PREVIEW-")
        child.send(key)
        child.send("\r")
        ends_with(child, f"CHOSEN {end}", 0)


@pytest.mark.parametrize("key", ["\x03", "\x1b", "\x04"])
def test_leaving(menu, key):
    child = menu()
    child.expect_exact("PREVIEW-A")
    child.send(key)
    ends_with(child, "LEFT", 130)


def test_letters_do_nothing(menu):
    child = menu()
    child.expect_exact("PREVIEW-A")
    child.send("jjkq5")
    child.send("\r")
    ends_with(child, "CHOSEN 00_best_general", 0)


def test_a_broken_preset_shows_its_problem(menu):
    child = menu()
    child.expect_exact("20_broken.json has 1 problem")
    child.send(DOWN * 3)
    child.expect_exact("model.num_layer")
    child.send("\r")
    # whoever opened the menu reads it again: it may be mended now
    ends_with(child, "CHOSEN 20_broken", 0)


def test_a_preview_that_never_comes_or_fails_disturbs_nobody(menu):
    """The keys go on, and what is chosen starts."""
    child = menu("00_slow")
    child.expect_exact("...")
    child.send(DOWN)
    child.expect_exact("ZeroDivisionError")
    child.send(DOWN)
    child.expect_exact("FINE")
    child.send("\r")
    ends_with(child, "CHOSEN 02_fine", 0)


def test_only_what_is_looked_at_is_worked_out(menu):
    child = menu("00_preset")
    child.expect_exact("PREVIEW-00")
    child.send(DOWN)
    child.expect("(PREVIEW-)?01")
    child.send("\r")
    child.expect_exact("CHOSEN 01_preset")
    ends_with(child, "LOOKED AT ['00_preset', '01_preset']", 0)


def test_what_could_not_start_is_said_below_the_list(menu):
    child = menu("00_refused")
    child.expect_exact("no such file")
    child.send("\r")
    ends_with(child, "CHOSEN 00_refused", 0)


@pytest.mark.slow
@pytest.mark.parametrize(("start", "hidden"), [("00", "25"), ("29", "03"), ("15", "25")])
def test_a_list_longer_than_the_screen_scrolls_above_its_preview(menu, start, hidden):
    child = menu(f"{start}_preset")
    child.expect_exact(f"Preset {start}")
    seen = child.before
    child.expect_exact(f"PREVIEW-{start}")  # what is off the screen is never written
    assert f"Preset {hidden}" not in seen + child.before
    child.send(DOWN * 16)
    child.send("\r")
    ends_with(child, f"CHOSEN {(int(start) + 16) % 30:02}_preset", 0)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4, 8])
def test_a_very_small_terminal_can_still_choose(menu, rows):
    child = menu(rows=rows)
    child.expect_exact("Best general")
    child.send(DOWN)
    child.send("\r")
    ends_with(child, "CHOSEN 01_best_qa", 0)


def test_a_terminal_that_cannot_be_drawn_on_asks_for_a_line(menu):
    child = menu(term="dumb")
    child.expect_exact("Enter takes 00_best_general")
    child.send("best qa\r")
    ends_with(child, "CHOSEN 01_best_qa", 0)


def piped(given: bytes):
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "10_harmonic"], input=given, capture_output=True, env=env
    )
    return done.returncode, done.stdout.decode().strip()


@pytest.mark.parametrize(
    ("given", "stem"),
    [
        (b"", "10_harmonic"),
        (b"\n", "10_harmonic"),
        (b"  \n01_best_qa\n", "10_harmonic"),
        (b"01_best_qa\nignored\n", "01_best_qa"),
        (b"01_BEST_qa", "01_best_qa"),
        (b"best GENERAL\r\n", "00_best_general"),
        (b"configs/90_quick.json\n", "90_quick"),
        (b"\xef\xbb\xbf90_quick\n", "90_quick"),
    ],
)
def test_the_first_line_of_a_pipe_names_the_preset(given, stem):
    assert piped(given) == (0, f"CHOSEN {stem}")


@pytest.mark.parametrize("given", [b"01_best_qq\n", b"\xff\xff\n"])
def test_an_unknown_name_is_refused_with_all_that_are_known(given):
    status, output = piped(given)
    assert status == 2 and output.startswith("ERROR no preset is called")
    assert all(card.stem in output for card in CARDS)
    assert ('did you mean "01_best_qa"?' in output) == (given == b"01_best_qq\n")


def test_a_broken_preset_named_by_a_pipe_tells_everything():
    assert piped(b"20_broken") == (
        2,
        "ERROR 20_broken.json has 1 problem\n  model.num_layer  unknown",
    )


def test_two_presets_of_one_name_must_be_told_apart(monkeypatch):
    cards = [PresetCard(stem, "g", "Same", "") for stem in ("a", "b")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("same\n"))
    with pytest.raises(UserError, match="say which: a, b"):
        choose(cards, "a")


def test_without_standard_input_the_default_is_taken(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert choose(CARDS, "10_harmonic") == "10_harmonic"


def test_a_missing_default_gives_way_to_the_first_card_and_no_cards_are_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert choose(CARDS, "removed") == "00_best_general"
    with pytest.raises(UserError, match="no presets"):
        choose([], "00_best_general")
