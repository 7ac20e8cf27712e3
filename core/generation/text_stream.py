"""The text of tokens that come one by one: as far as it is settled, until one of some strings comes
up in it.

In:    a tokenizer, strings that end the text; tokens
Out:   the text, whole or in pieces
State: the tokens, and how much of their text was taken

    tokens decoded    ..... a b c é # # �            �   half a character: not shown before its
                      other bytes have come
    `take` gives      ..... a b c é                  ##  may begin the stop string ###: held back
                      until that is known
"""

from core.data.tokenizer import Tokenizer

HALF = "\ufffd"
"""What bytes that are no whole character decode to."""


class Continuation:
    """A text that grows at its end. What `take` has given never changes, and the pieces join to
    `text`."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()):
        self._tokenizer = tokenizer
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max(map(len, self._stops), default=0)
        self.text = ""
        """What is settled; never half a character, unless the tokens ended amid one."""
        self.over = False
        self._ids: list[int] = []
        # text before `_end` is in `_base`; tokens from `_begin` on give the next ones their context
        self._begin = self._end = 0
        self._base = ""
        self._taken = 0

    def add(self, token: int) -> None:
        """One more token. `over` is True when a stop string came up: `text` ends where it begins,
        and takes no more."""
        assert not self.over
        self._ids.append(token)
        new = self._undecided()
        self._settle(self._base + new.rstrip(HALF))
        if new and not new.endswith(HALF):
            self._base, self._begin, self._end = self._base + new, self._end, len(self._ids)

    def finish(self) -> None:
        """No token follows: half a character stays what it is, and nothing is held back."""
        if not self.over:
            self._settle(self._base + self._undecided())
            self.over = True

    def take(self) -> str:
        """What has been settled since the last time and no stop string can cut any more; may be
        empty."""
        until = len(self.text) - (0 if self.over else self._held())
        piece = self.text[self._taken : until]
        self._taken = until
        return piece

    def _undecided(self) -> str:
        """The text of the tokens after `_end`. A few tokens before them are decoded with them, as
        some tokenizers write the first token of a text otherwise."""
        before = self._tokenizer.decode(self._ids[self._begin : self._end]) if self._end else ""
        return self._tokenizer.decode(self._ids[self._begin :])[len(before) :]

    def _settle(self, text: str) -> None:
        begin = max(0, len(self.text) - self._longest)
        cut = first_stop(text[begin:], self._stops)
        self.text, self.over = (text, False) if cut is None else (text[: begin + cut], True)

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        lengths = range(min(self._longest - 1, len(self.text)), 0, -1)
        return next(
            (n for n in lengths if any(stop.startswith(self.text[-n:]) for stop in self._stops)), 0
        )


def first_stop(text: str, until: tuple[str, ...]) -> int | None:
    """Where the first of some strings begins in a text; None where there is none of them."""
    return min((at for at in (text.find(stop) for stop in until if stop) if at >= 0), default=None)
