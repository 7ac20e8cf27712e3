"""Choosing a preset: a list with a preview on a terminal, one line of standard input elsewhere.

In:    a card for each preset, and the stem of the one that Enter alone takes
Out:   the stem of the one chosen
State: none
"""

import difflib
import os
import sys
import textwrap
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

from core.errors import UserError
from core.ui import text


@dataclass
class PresetCard:
    """What the menu knows of a preset."""

    stem: str  # file name without .json
    group: str  # heading it stands under; groups come in the order of their first card
    title: str  # the preset's `name`
    description: str  # one line
    preview: str  # what it would do, some lines
    problem: str | None = None  # why it cannot be run; the first line is shown in the list, all of it when chosen


def choose(cards: list[PresetCard], default: str) -> str:
    """The stem of the preset to run.

    Raises KeyboardInterrupt when the user leaves the menu, UserError for a name that is no preset and for a preset that
    has a problem (with all of the problem's text).
    """
    if not cards:
        raise UserError("there are no presets: configs/ holds no .json file")
    if default not in {card.stem for card in cards}:
        default = cards[0].stem
    drawable = _is_terminal(sys.stdin) and _is_terminal(sys.stdout) and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    stem = _pick(cards, default) if drawable else _named(cards, default, _first_line(cards, default))
    card = next(card for card in cards if card.stem == stem)
    if card.problem is not None:
        raise UserError(card.problem)
    return stem


def _is_terminal(stream: object) -> bool:
    return bool(stream is not None and not stream.closed and stream.isatty())  # type: ignore[attr-defined]


def _first_line(cards: list[PresetCard], default: str) -> str:
    """The first line of standard input. Someone at a keyboard whose screen cannot be drawn on is told what to type."""
    if sys.stdin is None or sys.stdin.closed:
        return ""
    if sys.stdin.isatty():
        names = "".join(f"  {card.stem}  {text.clean(card.description)}\n" for card in cards)
        print(f"Presets:\n{names}Name of a preset (Enter takes {default}): ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline()
    except UnicodeDecodeError:  # something was asked for, so this must not count as asking for nothing
        return "\ufffd"


def _named(cards: list[PresetCard], default: str, line: str) -> str:
    """The preset that a line of text means: by file stem, file name, or `name`, in upper or lower case."""
    wanted = line.strip().strip("\ufeff")
    if not wanted:
        return default
    key = wanted.removesuffix(".json").removeprefix("configs/").casefold()
    if by_stem := [card.stem for card in cards if card.stem.casefold() == key]:
        return by_stem[0]
    by_title = [card.stem for card in cards if card.title.casefold() == wanted.casefold()]
    if len(by_title) == 1:
        return by_title[0]
    if by_title:
        raise UserError(f'"{text.clean(wanted)}" is the name of {len(by_title)} presets; say which: {", ".join(by_title)}')
    known = {name.casefold(): card.stem for card in cards for name in (card.title, card.stem)}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f'; did you mean "{known[near[0]]}"?' if near else ""
    listed = "\n".join(f"  {card.stem}" + (f"  ({text.clean(card.title)})" if card.title != card.stem else "") for card in cards)
    raise UserError(f'no preset is called "{text.clean(wanted)}"{hint}\nPresets are\n{listed}')


def _pick(cards: list[PresetCard], default: str) -> str:
    """The menu. It has the whole screen while it is open and leaves what was there before untouched.

    questionary draws its description inside the list's own window, below the last choice, where a list longer than the
    screen scrolls it out of sight; so the two windows are made here, with the toolkit that questionary stands on.
    """
    from prompt_toolkit.application import Application, get_app
    from prompt_toolkit.formatted_text import StyleAndTextTuples
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.layout import Dimension, FormattedTextControl, HSplit, Layout, ScrollOffsets, Window
    from prompt_toolkit.styles import Style

    cards = _grouped(cards)
    at = next(i for i, card in enumerate(cards) if card.stem == default)

    def columns() -> int:
        return get_app().output.get_size().columns

    def name_width() -> int:
        return min(max(cell_len(card.title) for card in cards) + 2, max(12, columns() // 2))

    def previewed(card: PresetCard) -> list[str]:
        """The preview, headed by the description where the list has no room for all of it."""
        lines = [text.clean(line) for line in (card.problem or card.preview).splitlines()]
        described = text.clean(card.description)
        if not card.problem and cell_len(described) > columns() - name_width() - 6:
            lines.insert(0, described)
        return [piece for line in lines for piece in textwrap.wrap(line, max(10, columns() - 4), subsequent_indent="  ") or [""]]

    def preview_rows() -> int:
        """The same for every preset, so that the list does not move; at most two fifths of the screen, none of a tiny one."""
        rows = get_app().output.get_size().rows
        most = max(rows * 2 // 5, rows - len(cards) * 2 - 4) if rows >= 10 else rows - 7
        return max(0, min(max(len(previewed(card)) for card in cards), most))

    def listing() -> StyleAndTextTuples:
        out: StyleAndTextTuples = []
        width = name_width()
        for i, card in enumerate(cards):
            if i == 0 or card.group != cards[i - 1].group:
                out.append(("class:group", f"  {text.clean(card.group)}\n"))
            here = i == at
            out.append(("class:pointer", "  ❯ " if here else "    "))
            if here:
                out.append(("[SetCursorPosition]", ""))
            name = set_cell_size(_cut(text.clean(card.title), width - 2), width)
            says = _cut(text.clean((card.problem or card.description).split("\n")[0]), columns() - width - 6)
            out.append(("class:here" if here else "class:broken" if card.problem else "", name))
            out.append(
                (
                    "class:broken" if card.problem else "class:here" if here else "class:beside",
                    says + "\n" * (card is not cards[-1]),
                )
            )
        return out

    def rule() -> StyleAndTextTuples:
        stem = f" {cards[at].stem} "
        return [("class:rule", "──"), ("class:stem", stem), ("class:rule", "─" * max(0, columns() - len(stem) - 2))]

    def preview() -> StyleAndTextTuples:
        style = "class:problem" if cards[at].problem else ""
        return [(style, "\n".join(f"  {line}" for line in previewed(cards[at])))]

    keys = KeyBindings()

    def move(by: int, around: bool = False):
        def handler(_: object) -> None:
            nonlocal at
            at = (at + by) % len(cards) if around else min(len(cards) - 1, max(0, at + by))

        return handler

    for names, handler in {
        ("up", "c-p"): move(-1, around=True),
        ("down", "c-n", "tab"): move(1, around=True),
        ("pageup",): move(-10),
        ("pagedown",): move(10),
        ("home",): move(-len(cards)),
        ("end",): move(len(cards)),
        ("enter",): lambda event: event.app.exit(result=cards[at].stem),
        ("c-c", "escape", "c-d", "c-q"): lambda event: event.app.exit(exception=KeyboardInterrupt),
    }.items():
        for name in names:
            keys.add(name)(handler)

    def heading() -> StyleAndTextTuples:
        return [("class:title", "  zeroarg"), ("class:help", f"   choose a preset   {at + 1} of {len(cards)}")]

    def spoken() -> StyleAndTextTuples:
        enter = "says what is wrong with it" if cards[at].problem else f"starts {cards[at].stem}"
        return [("class:help", _cut(f"  ↑ ↓ choose   Enter {enter}   Esc leaves", columns() - 1))]

    list_window = Window(
        FormattedTextControl(listing, focusable=True, show_cursor=False),
        scroll_offsets=ScrollOffsets(top=2, bottom=2),
        dont_extend_height=True,
    )
    layout = HSplit(
        [
            Window(FormattedTextControl(heading), height=1),
            list_window,
            Window(FormattedTextControl(rule), height=1),
            Window(FormattedTextControl(preview), height=lambda: Dimension.exact(preview_rows())),
            Window(FormattedTextControl(spoken), height=1),
            Window(height=Dimension(min=0, preferred=0, weight=1)),
        ]
    )
    style = Style.from_dict(
        {
            "title": "bold ansicyan",
            "group": "bold",
            "pointer": "bold ansicyan",
            "here": "bold ansicyan",
            "beside": "ansibrightblack",
            "broken": "ansired",
            "rule": "ansibrightblack",
            "stem": "ansicyan",
            "problem": "ansired",
            "help": "ansibrightblack",
        }
    )
    application: Application[str] = Application(
        Layout(layout, focused_element=list_window), key_bindings=keys, style=style, full_screen=True
    )
    return application.run()


def _grouped(cards: list[PresetCard]) -> list[PresetCard]:
    """Cards of one group next to each other, everything else in the order given."""
    groups = list(dict.fromkeys(card.group for card in cards))
    return sorted(cards, key=lambda card: groups.index(card.group))


def _cut(line: str, width: int) -> str:
    return line if cell_len(line) <= width else set_cell_size(line, max(0, width - 1)) + "…"
