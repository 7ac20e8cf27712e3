"""What the tokenize job shows: in the menu, and while it works."""

import io
from pathlib import Path

import pytest

from core.data.token_files import read_manifest
from core.jobs import JOBS
from core.preset.decode import decode_preset
from core.preview import preset_card
from core.registry import Preset
from core.runtime import detect_runtime
from core.ui.tokenize import TokenizeView
from tests.jobs.test_tokenize import preset_of, tokenize_here

# what is shown ------------------------------------------------------------------------------------


def test_the_menu_shows_what_is_written_and_how_far_it_is(tmp_path: Path) -> None:
    preset = decode_preset(preset_of(tokenize={"max_tokens": 9000}), Preset, "t", "t")
    card = preset_card("91_t", preset, detect_runtime(), tmp_path)
    preview = card.preview()
    assert "parameters" not in preview and "tokenizes texts; tokenizer: bytes" in preview
    assert (
        "writes tokens/<source>/chunk_00000.bin ..., 5,000 tokens each, at most 9,000 of a source"
        in preview
    )
    assert JOBS["tokenize"].preview(preset, tmp_path)[-1] == "starts fresh"
    tokenize_here(preset_of(tokenize={"max_tokens": 9000}), tmp_path)
    total = read_manifest(tmp_path / "tokens" / "texts").total_tokens
    assert (
        JOBS["tokenize"].preview(preset, tmp_path)[-1] == f"texts: {total:,} tokens written, done"
    )


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_progress_is_a_line_now_and_then_or_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    lines = io.StringIO()
    with TokenizeView(lines, clock=lambda: now[0]) as view:
        view.begin("wiki", 1_000_000)
        for second in range(1, 12):
            now[0] = float(second)
            view.update(1_000_000 + 500_000 * second, 10 * second, 0.5 if second == 10 else None)
        view.tell("done\x1b[2J")
    assert lines.getvalue().splitlines() == [
        "wiki  3.5M tokens  50 documents  500k tokens/s",
        "wiki  6M tokens  100 documents  500k tokens/s  50 %  12s left",
        "done",
    ]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    with TokenizeView(terminal, clock=lambda: now[0]) as view:
        view.begin("wiki [bold]", 0)
        now[0] += 2
        view.update(2_000_000, 70, 0.25)
        view.tell("a line [bold]")
        view._bar.refresh()
    drawn = terminal.getvalue()
    assert (
        "wiki [bold]" in drawn
        and "a line [bold]" in drawn
        and "2M tokens  70 documents  1M tokens/s  25 %  6s left" in drawn
    )
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") > 0  # the cursor is given back
