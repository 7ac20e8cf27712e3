"""The menu of presets: a list with a preview on a terminal, one line of standard input elsewhere.

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
from typing import TYPE_CHECKING, Any, TextIO

from rich.cells import cell_len
from rich.text import Text

from core.errors import UserError
from core.terminal import tell
from core.ui import text

if TYPE_CHECKING:  # prompt_toolkit is slow to import, and not needed where there is no terminal
    from prompt_toolkit.data_structures import Size
    from prompt_toolkit.formatted_text import StyleAndTextTuples
    from prompt_toolkit.layout import AnyContainer, Dimension, HSplit, Window

PREVIEW_LINES = 8
"""Lines of the previews of shipped presets on a screen of usual width."""

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
    """A preset as the menu shows it."""

    stem: str  # file name without .json
    group: str  # heading it stands under; groups come in the order of their first card
    title: str  # the preset's `name`
    description: str  # one line
    # returns what it would do, in some lines; called only when it is looked at
    preview: Callable[[], str] = str
    # why it cannot be run; the first line is shown in the list, all of it when chosen
    problem: str | None = None
    refusal: str = ""  # why it could not start when it was chosen

    @property
    def trouble(self) -> str:
        """Return what is wrong with the preset, if anything."""
        return self.problem or self.refusal


def choose(cards: list[PresetCard], default: str) -> str:
    """Ask for a preset and return its stem.

    Raises KeyboardInterrupt when the user leaves the menu. Where there is no menu, raises UserError
    for a name that is no preset, and for a preset that has a problem (with all of its text); the
    menu shows that below the list.

    default   stem of the preset that Enter alone takes
    """
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
    """Tell whether there is a terminal that a menu can be drawn on, and somebody at it."""
    return (
        _is_terminal(sys.stdin)
        and _is_terminal(sys.stdout)
        and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    )


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _first_line(cards: list[PresetCard], default: str) -> str:
    """Read the first line of standard input. If somebody types at a screen that cannot be drawn on,
    show the names first."""
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
        # something was typed, so this must not count as an empty line
        return "\ufffd"


def _named(cards: list[PresetCard], default: str, line: str) -> str:
    """Find the preset that a line of text names: by file stem, file name, or `name`, in upper or
    lower case. Raises UserError."""
    requested = line.strip().strip("\ufeff")
    if not requested:
        tell(
            f"No preset was named, so {default} starts. To choose another, run main.py on a "
            f"terminal, or name one in the first line of its input: echo {cards[-1].stem} | "
            "python main.py"
        )
        return default
    key = requested.removesuffix(".json").removeprefix("configs/").casefold()
    if by_stem := [card.stem for card in cards if card.stem.casefold() == key]:
        return by_stem[0]
    by_title = [card.stem for card in cards if card.title.casefold() == requested.casefold()]
    if len(by_title) == 1:
        return by_title[0]
    if by_title:
        raise UserError(
            f'"{text.clean(requested)}" is the name of {len(by_title)} presets; say which: '
            f"{', '.join(by_title)}"
        )
    known = {name.casefold(): card.stem for card in cards for name in (card.title, card.stem)}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f'; did you mean "{known[near[0]]}"?' if near else ""
    listed = "\n".join(
        f"  {card.stem}" + (f"  ({text.clean(card.title)})" if card.title != card.stem else "")
        for card in cards
    )
    raise UserError(f'no preset is called "{text.clean(requested)}"{hint}\nPresets are\n{listed}')


def _pick(cards: list[PresetCard], default: str) -> str:
    """Show the menu and return the chosen preset's stem. It has the whole screen while it is open,
    and leaves what was there untouched.

    questionary can describe a choice only inside its list, where the description of a long list
    scrolls out of sight. So its list, keys and style are taken, and a pane of ours is put below it.
    """
    import questionary
    from prompt_toolkit.application import Application, get_app_session
    from prompt_toolkit.filters import Always
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent, merge_key_bindings
    from prompt_toolkit.layout import Layout, ScrollOffsets
    from questionary.prompts.common import InquirerControl

    size = get_app_session().output.get_size
    list_only = questionary.select(
        "choose a preset",
        _choices(cards, size().columns),
        default=default,
        qmark="zeroarg",
        pointer="❯",
        instruction="  ↑ ↓ move   Enter starts it   Esc leaves",
        use_jk_keys=False,
        style=questionary.Style.from_dict(STYLE),
    ).application
    for window in list_only.layout.find_all_windows():
        if isinstance(window.content, InquirerControl):
            control = window.content
            window.cursorline = Always()
            window.dont_extend_height = Always()
            window.scroll_offsets = ScrollOffsets(top=2, bottom=2)
    by_stem = {card.stem: card for card in cards}
    pane = PreviewPane(cards, lambda: by_stem[str(control.get_pointed_at().value)], size)

    def leave(event: KeyPressEvent) -> None:
        event.app.exit(exception=KeyboardInterrupt)

    keys = KeyBindings()
    keys.add("escape", eager=True)(leave)
    keys.add("c-d")(leave)
    everything, focused = pane.below(list_only.layout.container)
    application: Application[str] = Application(
        # not questionary's hidden input line, which has keys of its own
        Layout(everything, focused_element=focused),
        key_bindings=merge_key_bindings([list_only.key_bindings or KeyBindings(), keys]),
        style=list_only.style,
        full_screen=True,
    )
    pane.previews.changed = application.invalidate
    return application.run()


def _choices(cards: list[PresetCard], columns: int) -> list[Any]:
    """Return questionary's choices: the presets under the headings of their groups."""
    import questionary

    widest = max(cell_len(text.clean(card.title)) for card in cards)
    name_width = min(widest, columns // 2)

    def choice(card: PresetCard) -> questionary.Choice:
        styles = ("class:broken",) * 2 if card.trouble else ("", "class:beside")
        parts = (
            text.clean(card.title),
            text.clean((card.trouble or card.description).split("\n")[0]),
        )
        widths = (name_width, columns - name_width - 8)
        title = [(s, "  " + _fitted(p, w)) for s, p, w in zip(styles, parts, widths)]
        return questionary.Choice(title, card.stem)

    choices: list[questionary.Choice] = []
    for group in dict.fromkeys(card.group for card in cards):
        choices.append(questionary.Separator(text.clean(group)))
        choices += [choice(card) for card in cards if card.group == group]
    return choices


class PreviewPane:
    """The lower part of the menu: what the preset that is pointed at would do, or why it cannot."""

    def __init__(
        self,
        cards: list[PresetCard],
        pointed_at: Callable[[], PresetCard],
        size: "Callable[[], Size]",
    ):
        """`size` returns the rows and columns of the screen."""
        self._cards, self._pointed_at, self._size = cards, pointed_at, size
        self.previews = Previews()
        self._tallest = PREVIEW_LINES

    def below(self, container: "AnyContainer") -> "tuple[HSplit, Window]":
        """Return a layout with this pane below a container, and the pane's window."""
        from prompt_toolkit.layout import FormattedTextControl, HSplit, VerticalAlign, Window

        content = FormattedTextControl(self._content, focusable=True, show_cursor=False)
        pane = Window(content, height=self._height, wrap_lines=True)
        heading = FormattedTextControl(self._heading)
        ruler = Window(heading, height=1, char="─", style="class:beside")
        return HSplit([container, ruler, pane], align=VerticalAlign.TOP), pane

    def _heading(self) -> "StyleAndTextTuples":
        return [("", "── "), ("class:pointer", text.clean(self._pointed_at().stem)), ("", " ")]

    def _content(self) -> "StyleAndTextTuples":
        card = self._pointed_at()
        style = "class:broken" if card.trouble else ""
        return [(style, "\n".join(f"  {line}" for line in self._lines(card)))]

    def _lines(self, card: PresetCard) -> list[str]:
        whole = card.trouble or f"{card.description}\n{self.previews.of(card)}"
        width = max(10, self._size().columns - 4)
        return [
            piece
            for line in whole.splitlines()
            for piece in textwrap.wrap(text.clean(line), width, subsequent_indent="  ")
        ]

    def _height(self) -> "Dimension":
        """Return the height of the longest text so far, so that nothing is cut and little moves: at
        most two fifths of the screen."""
        from prompt_toolkit.layout import Dimension

        seen = [card for card in self._cards if card.trouble] + [self._pointed_at()]
        self._tallest = max(self._tallest, *(len(self._lines(card)) for card in seen))
        most = max(0, self._size().rows - 2) * 2 // 5
        return Dimension.exact(min(most, self._tallest))


class Previews:
    """The previews of presets, each computed in a thread when it is looked at: one that is slow or
    fails does not disturb the menu."""

    def __init__(self) -> None:
        self.changed: Callable[[], None] = lambda: None
        self._texts: dict[str, str] = {}

    def of(self, card: PresetCard) -> str:
        """Return a preset's preview; "..." until it is computed."""
        if card.stem not in self._texts:
            self._texts[card.stem] = "..."
            threading.Thread(target=self._compute, args=(card,), daemon=True).start()
        return self._texts[card.stem]

    def _compute(self, card: PresetCard) -> None:
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
