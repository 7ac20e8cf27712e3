"""Find the files that a path in a preset stands for: a file, a folder to any depth, or a pattern.

In:    a path as the preset writes it, relative to the project; which names are readable
Out:   each file once, however many paths lead to it; what was passed over is named and counted
State: none
"""

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from core.files import own_path

_KINDS_SHOWN = 6


@dataclass
class FoundFiles:
    """Files by their real paths, and whatever else was there."""

    paths: dict[str, Path] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)  # suffix: files
    examples: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, None] = field(default_factory=dict)  # names that begin with a dot
    # folders that cannot be listed, links to nowhere
    closed: dict[str, OSError] = field(default_factory=dict)

    def add(self, path: Path, readable: Callable[[Path], bool]) -> None:
        if not path.is_file():
            if path.is_symlink() and not path.exists():
                self.closed[str(path)] = FileNotFoundError()
            else:
                self._pass_over("folders" if path.is_dir() else "devices and pipes", path)
        elif readable(path):
            self.paths.setdefault(os.path.realpath(path), path)
        else:
            self._pass_over(path.suffix.lower() or "files without a suffix", path)

    def _pass_over(self, kind: str, path: Path) -> None:
        self.unread[kind] += 1
        self.examples.setdefault(kind, path.name)

    def remarks(self, advice: str) -> list[str]:
        """Return what a person should know about the files that are not read."""
        notes = []
        if self.unread:
            kinds = [f"{count} {kind}" for kind, count in self.unread.most_common(_KINDS_SHOWN)]
            others = len(self.unread) - _KINDS_SHOWN
            more = f" and {others} kinds more" if others > 0 else ""
            example = self.examples[self.unread.most_common(1)[0][0]]
            notes.append(f"not read: {', '.join(kinds)}{more} (for example {example}); {advice}")
        if self.hidden:
            notes.append(
                f"not read: {len(self.hidden)} hidden (for example {next(iter(self.hidden))})"
            )
        return notes


def find_files(
    pattern: str, root: Path, readable: Callable[[Path], bool], found: FoundFiles
) -> tuple[Path, str]:
    """Add the files that `pattern` stands for to `found`. Returns the path that was looked at, and
    what it is: "a file", "a folder", "a pattern", or "" where nothing has that name and it is no
    pattern."""
    path = own_path(pattern, root)
    if path.is_dir():
        for each in walk(path, found):
            found.add(each, readable)
        return path, "a folder"
    if path.exists():
        found.add(path, readable)
        return path, "a file"
    if not glob.has_magic(pattern):
        return path, ""
    for each in sorted(_matches(path, found), key=_links_last):
        found.add(each, readable)
    return path, "a pattern"


def walk(folder: Path, found: FoundFiles) -> Iterator[Path]:
    """Yield every path under a folder that is not hidden, and follow links. Linked files come last,
    so that a file that is also there itself goes by its own name. No folder comes twice."""
    seen: set[str] = set()
    folders, links, linked = [folder], list[Path](), list[Path]()
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        if (real := os.path.realpath(here)) in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            found.closed[str(here)] = error
            continue
        for entry in entries:
            path = here / entry.name
            if entry.name.startswith("."):
                found.hidden[entry.name] = None
            elif path.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif entry.is_symlink():
                linked.append(path)
            else:
                yield path
    yield from linked


def _matches(path: Path, found: FoundFiles) -> Iterable[Path]:
    """Return what matches a pattern. The longest part of the pattern that exists is taken as it
    is, since brackets may stand in real names; only the rest is a pattern."""
    depth = next(d for d in range(len(path.parts), 0, -1) if Path(*path.parts[:d]).exists())
    base, rest = Path(*path.parts[:depth]), path.parts[depth:]
    if "**" not in rest:
        literal = ["".join(f"[{c}]" if c == "[" else c for c in part) for part in rest]
        for parts in (rest, literal):  # or else the brackets are no pattern either
            if matches := glob.glob(os.path.join(glob.escape(str(base)), *parts)):
                return map(Path, matches)
        return []
    return [each for each in walk(base, found) if _fits(each.relative_to(base).parts, rest)]


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Return whether the parts of a path match those of a pattern; "**" stands for any number of
    folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _links_last(path: Path) -> tuple[bool, str]:
    return path.is_symlink(), str(path)
