"""The progress of a tokenization: tokens, documents, speed and time left of the current source.

In:    messages and counts of the tokenize job
Out:   a ProgressLine's lines and bar
State: tokens that were written before this process
"""

from core.ui import text
from core.ui.progress_line import ProgressLine


class TokenizeView(ProgressLine):
    """The view of the tokenize job."""

    _began_tokens = 0

    def begin(self, name: str, tokens: int) -> None:
        """Begin a source, of which an earlier process wrote `tokens`."""
        self._began_tokens = tokens
        self.start(name)

    def update(self, tokens: int, documents: int, fraction: float | None) -> None:
        """Show what is written; `fraction` of the source is done, None if unknown."""
        if not self.due:
            return
        spent, new = self.seconds, tokens - self._began_tokens
        parts = [f"{text.count(tokens)} tokens", f"{documents:,} documents"]
        if spent > 0 and new > 0:
            parts.append(f"{text.count(new / spent)} tokens/s")
            if fraction and tokens:  # what earlier processes wrote took no time of this one
                left = spent / new * tokens * (1 - fraction) / fraction
                parts += [f"{fraction * 100:.0f} %", f"{text.duration(left)} left"]
        self.show(parts, fraction)
