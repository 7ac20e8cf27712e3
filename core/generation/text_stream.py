"""Detokenizing a stream of tokens: the text as far as it is final, until a stop string comes up in
it.

In:    a tokenizer, strings that end the text; tokens
Out:   the text, whole or in pieces
State: the tokens, and how much of their text was taken

    tokens decoded    ..... a b c é # # �            �   half a character: held back until
                      its other bytes have come
    `take` gives      ..... a b c é                  ##  may begin the stop string ###: held back
                      until that is known
"""

from core.data.tokenizer import Tokenizer

HALF = "\ufffd"
"""What bytes that are no whole character decode to."""


class TextStream:
    """A text that grows at its end. Pieces from `take` never change, and join to `text`."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()):
        self._tokenizer = tokenizer
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max(map(len, self._stops), default=0)
        self.text = ""
        """What is final; never half a character, unless the tokens ended within one."""
        self.finished = False
        self._ids: list[int] = []
        # text before `_end` is in `_base`; tokens from `_begin` on give the next ones their context
        self._begin = self._end = 0
        self._base = ""
        self._taken = 0

    def add(self, token: int) -> None:
        """Add a token. Sets `finished` when a stop string came up: `text` then ends where it
        begins."""
        assert not self.finished
        self._ids.append(token)
        new = self._pending()
        self._settle(self._base + new.rstrip(HALF))
        if new and not new.endswith(HALF):
            self._base, self._begin, self._end = self._base + new, self._end, len(self._ids)

    def finish(self) -> None:
        """End the text: half a character stays as it is, and nothing is held back any more."""
        if not self.finished:
            self._settle(self._base + self._pending())
            self.finished = True

    def take(self) -> str:
        """Return what became final since the last call, and no stop string can cut any more; may be
        empty."""
        until = len(self.text) - (0 if self.finished else self._held_back())
        piece = self.text[self._taken : until]
        self._taken = until
        return piece

    def _pending(self) -> str:
        """Return the text of the tokens after `_end`. A few tokens before them are decoded with
        them, because some tokenizers write the first token of a text differently."""
        before = self._tokenizer.decode(self._ids[self._begin : self._end]) if self._end else ""
        return self._tokenizer.decode(self._ids[self._begin :])[len(before) :]

    def _settle(self, text: str) -> None:
        begin = max(0, len(self.text) - self._longest)
        cut = first_stop(text[begin:], self._stops)
        self.finished = cut is not None
        self.text = text if cut is None else text[: begin + cut]

    def _held_back(self) -> int:
        """Return how many characters at the end may begin a stop string."""
        for n in range(min(self._longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-n:]) for stop in self._stops):
                return n
        return 0


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Return where the first of some strings begins in a text; None where there is none of them."""
    return min((at for at in (text.find(stop) for stop in stops if stop) if at >= 0), default=None)
