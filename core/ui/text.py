"""Numbers, durations and foreign text in the form a person reads, and small charts in block
characters.

In:    numbers and strings
Out:   strings
State: none
"""

from collections.abc import Sequence

from core.terminal import clean as clean
from core.terminal import clean_lines as clean_lines

BLOCKS = " ▁▂▃▄▅▆▇█"


def count(value: float | None) -> str:
    """Format 12 345 678 as "12.3M": three significant digits."""
    if value is None:
        return "–"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
            text = f"{scaled:.{digits}f}"
            return (text.rstrip("0").rstrip(".") if "." in text else text) + unit
    return f"{value:.0f}" if abs(value) >= 99.95 or value == int(value) else f"{value:.1f}"


def duration(seconds: float | None) -> str:
    """Format 3840 seconds as "1h 04m"."""
    if seconds is None:
        return "–"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def number(value: float | None, digits: int = 3) -> str:
    """Format a loss or a norm: fixed point where that is readable, else a power of ten; a dash for
    None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if 0.01 <= abs(value) < 10000:
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def change(now: float | None, before: float | None) -> str:
    """Format the change against the value before as "−0.12"; "" where there is none."""
    if now is None or before is None:
        return ""
    return f"{now - before:+.3f}".replace("-", "−")


def memory(megabytes: float | None) -> str:
    """Format an amount of memory as "512 MB" or "1.5 GB"."""
    if megabytes is None:
        return "–"
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1024:.1f} GB"


def chart(values: Sequence[float], width: int, rows: int = 1) -> list[str]:
    """Draw values as columns of blocks, top row first. A longer series is averaged into `width`
    columns. The lowest value is still one eighth of a row high, which tells it from no value."""
    if not values or width < 1:
        return [""] * rows
    columns = _binned(values, width)
    low, high = min(columns), max(columns)
    scale = (rows * 8 - 1) / (high - low) if high > low else 0.0
    heights = [1 + round((value - low) * scale) for value in columns]
    return [
        "".join(BLOCKS[min(8, max(0, h - 8 * row))] for h in heights)
        for row in reversed(range(rows))
    ]


def _binned(values: Sequence[float], width: int) -> list[float]:
    n = len(values)
    if n <= width:
        return list(values)
    edges = [n * i // width for i in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]


class History:
    """A whole run's values in bounded memory: when it is full, neighbours are averaged, and from
    then on each place holds the mean of twice as many."""

    def __init__(self, capacity: int = 512):
        self.values: list[float] = []
        self.capacity, self._per_place, self._sum, self._n = capacity, 1, 0.0, 0

    def add(self, value: float) -> None:
        self._sum, self._n = self._sum + value, self._n + 1
        if self._n < self._per_place:
            return
        self.values.append(self._sum / self._n)
        self._sum, self._n = 0.0, 0
        if len(self.values) >= self.capacity:
            self.values = [(a + b) / 2 for a, b in zip(self.values[::2], self.values[1::2])]
            self._per_place *= 2
