"""Choosing a preset: a list with a preview on a terminal, one line of standard input elsewhere.

In:    a card for each preset, and the stem of the one that Enter alone takes
Out:   the stem of the one chosen
State: none
"""

import difflib
import os
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from core.errors import UserError
from core.terminal import tell
from core.ui import text

PREVIEW_LINES = 8
"""What previews of shipped presets take on a screen of usual width."""

STYLE = {
    "qmark": "bold ansicyan",
    "instruction": "ansibrightblack",
    "pointer": "bold ansicyan",
    "cursor-line": "bold nounderline",
    "separator": "bold",
    "beside": "ansibrightblack",
    "broken": "ansired",
}


@dataclass
class PresetCard:
    """What the menu knows of a preset."""

    stem: str  # file name without .json
    group: str  # heading it stands under; groups come in the order of their first card
    title: str  # the preset's `name`
    description: str  # one line
    # what it would do, some lines: worked out only when it is looked at
    preview: Callable[[], str] = str
    # why it cannot be run; the first line is shown in the list, all of it when chosen
    problem: str | None = None
    refusal: str = ""  # why it could not start when it was chosen


def choose(cards: list[PresetCard], default: str) -> str:
    """The stem of the preset to run.

    Raises KeyboardInterrupt when the user leaves the menu. Where there is no menu, UserError for a
    name that is no preset and for a preset that has a problem (with all of the problem's text); in
    the menu, that stands below the list."""
    if not cards:
        raise UserError("there are no presets: configs/ holds no .json file")
    if default not in {card.stem for card in cards}:
        default = cards[0].stem
    if can_pick():
        return _pick(cards, default)
    stem = _named(cards, default, _first_line(cards, default))
    card = next(card for card in cards if card.stem == stem)
    if card.problem is not None:
        raise UserError(card.problem)
    return stem


def can_pick() -> bool:
    """Whether there is a terminal that a menu can be drawn on, and somebody at it."""
    return (
        _is_terminal(sys.stdin)
        and _is_terminal(sys.stdout)
        and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    )


def _is_terminal(stream: object) -> bool:
    return bool(stream is not None and not stream.closed and stream.isatty())  # type: ignore[attr-defined]


def _first_line(cards: list[PresetCard], default: str) -> str:
    """The first line of standard input. Someone at a keyboard whose screen cannot be drawn on is
    told what to type."""
    if sys.stdin is None or sys.stdin.closed:
        return ""
    if sys.stdin.isatty():
        names = "".join(
            f"  {text.clean(card.stem)}  {text.clean(card.description)}\n" for card in cards
        )
        tell(f"Presets:\n{names}Name of a preset (Enter takes {default}):")
    try:
        return sys.stdin.readline()
    except UnicodeDecodeError:
        # something was asked for, so this must not count as asking for nothing
        return "\ufffd"


def _named(cards: list[PresetCard], default: str, line: str) -> str:
    """The preset that a line of text means: by file stem, file name, or `name`, in upper or lower
    case."""
    wanted = line.strip().strip("\ufeff")
    if not wanted:
        tell(
            f"No preset was named, so {default} starts. To choose another, run main.py on a "
            "terminal, or name one in the first "
            f"line of its input: echo {cards[-1].stem} | python main.py"
        )
        return default
    key = wanted.removesuffix(".json").removeprefix("configs/").casefold()
    if by_stem := [card.stem for card in cards if card.stem.casefold() == key]:
        return by_stem[0]
    by_title = [card.stem for card in cards if card.title.casefold() == wanted.casefold()]
    if len(by_title) == 1:
        return by_title[0]
    if by_title:
        raise UserError(
            f'"{text.clean(wanted)}" is the name of {len(by_title)} presets; say which: '
            f"{', '.join(by_title)}"
        )
    known = {name.casefold(): card.stem for card in cards for name in (card.title, card.stem)}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f'; did you mean "{known[near[0]]}"?' if near else ""
    listed = "\n".join(
        f"  {card.stem}" + (f"  ({text.clean(card.title)})" if card.title != card.stem else "")
        for card in cards
    )
    raise UserError(f'no preset is called "{text.clean(wanted)}"{hint}\nPresets are\n{listed}')


def _pick(cards: list[PresetCard], default: str) -> str:
    """questionary's menu with a preview below it. It has the whole screen while open and leaves
    what was there untouched.

    questionary's own place for more about a choice is inside its list, where a list longer than the
    screen scrolls it out of sight; so its list, keys and style are taken and a pane of ours is put
    under them."""
    import questionary
    from prompt_toolkit.application import Application, get_app_session
    from prompt_toolkit.filters import Always
    from prompt_toolkit.key_binding import KeyBindings, merge_key_bindings
    from prompt_toolkit.layout import (
        Dimension,
        FormattedTextControl,
        HSplit,
        Layout,
        ScrollOffsets,
        VerticalAlign,
        Window,
    )
    from questionary.prompts.common import InquirerControl

    by_stem = {card.stem: card for card in cards}
    screen = get_app_session().output.get_size
    previews = Previews()
    columns = screen().columns
    name_width = min(max(cell_len(text.clean(card.title)) for card in cards), columns // 2)

    def choice(card: PresetCard) -> questionary.Choice:
        name, says = (
            text.clean(card.title),
            text.clean((card.problem or card.refusal or card.description).split("\n")[0]),
        )
        styles = (
            ("class:broken", "class:broken")
            if card.problem or card.refusal
            else ("", "class:beside")
        )
        widths = (name_width, columns - name_width - 8)
        return questionary.Choice(
            [(s, "  " + _fitted(part, w)) for s, part, w in zip(styles, (name, says), widths)],
            card.stem,
        )

    choices = {card.stem: choice(card) for card in cards}
    listed: list[questionary.Choice] = []
    for group in dict.fromkeys(card.group for card in cards):
        listed.append(questionary.Separator(text.clean(group)))
        listed += [choices[card.stem] for card in cards if card.group == group]
    asked = questionary.select(
        "choose a preset",
        listed,
        default=choices[default],
        qmark="zeroarg",
        pointer="❯",
        instruction="  ↑ ↓ move   Enter starts it   Esc leaves",
        use_jk_keys=False,
        style=questionary.Style.from_dict(STYLE),
    ).application
    window = next(
        w for w in asked.layout.find_all_windows() if isinstance(w.content, InquirerControl)
    )
    window.cursorline, window.dont_extend_height, window.scroll_offsets = (
        Always(),
        Always(),
        ScrollOffsets(top=2, bottom=2),
    )

    def here() -> PresetCard:
        return by_stem[window.content.get_pointed_at().value]

    def lines(card: PresetCard) -> list[str]:
        whole = card.problem or card.refusal or f"{card.description}\n{previews.of(card)}"
        width = max(10, screen().columns - 4)
        return [
            piece
            for line in whole.splitlines()
            for piece in textwrap.wrap(text.clean(line), width, subsequent_indent="  ")
        ]

    def preview() -> list[tuple[str, str]]:
        return [
            (
                "class:broken" if here().problem or here().refusal else "",
                "\n".join(f"  {line}" for line in lines(here())),
            )
        ]

    def height() -> Dimension:
        """The same for every preset, so that nothing moves; at most two fifths of the screen."""
        told = max((len(lines(card)) for card in cards if card.problem or card.refusal), default=0)
        return Dimension.exact(min(max(0, screen().rows - 2) * 2 // 5, max(PREVIEW_LINES, told)))

    def leave(event) -> None:
        event.app.exit(exception=KeyboardInterrupt)

    keys = KeyBindings()
    keys.add("escape", eager=True)(leave)
    keys.add("c-d")(leave)
    rule = FormattedTextControl(
        lambda: [("", "── "), ("class:pointer", text.clean(here().stem)), ("", " ")]
    )
    pane = Window(
        FormattedTextControl(preview, focusable=True, show_cursor=False),
        height=height,
        wrap_lines=True,
    )
    ruler = Window(rule, height=1, char="─", style="class:beside")
    everything = HSplit([asked.layout.container, ruler, pane], align=VerticalAlign.TOP)
    application: Application = Application(
        # not questionary's hidden input line, which has keys of its own
        Layout(everything, focused_element=pane),
        key_bindings=merge_key_bindings([asked.key_bindings, keys]),
        style=asked.style,
        full_screen=True,
    )
    previews.changed = application.invalidate
    return application.run()


class Previews:
    """What presets would do, each worked out beside the menu when it is looked at: one that is slow
    or fails disturbs nobody."""

    def __init__(self) -> None:
        self.changed: Callable[[], None] = lambda: None
        self._texts: dict[str, str] = {}

    def of(self, card: PresetCard) -> str:
        """As far as it is known."""
        if card.stem not in self._texts:
            self._texts[card.stem] = "..."
            threading.Thread(target=self._work_out, args=(card,), daemon=True).start()
        return self._texts[card.stem]

    def _work_out(self, card: PresetCard) -> None:
        try:
            self._texts[card.stem] = card.preview()
        except Exception as error:
            self._texts[card.stem] = (
                f"cannot tell what it would do: {type(error).__name__}: {error}"
            )
        self.changed()


def _fitted(line: str, width: int) -> str:
    fitted = Text(line)
    fitted.truncate(max(1, width), overflow="ellipsis", pad=True)
    return fitted.plain
