"""What a source passed over, and what it had to read another way: files by kind, rows by reason,
each with an example.

In:    files and rows, as their readers meet them
Out:   notes for a person, and (file, why) pairs for the log
State: the counts. They grow while reading: not every file is looked into at opening
"""

from collections.abc import Callable, Iterator

from core.data.documents import Document, SkipRow

_NAMES_SHOWN = 5
_COLUMNS_SHOWN = 300  # characters

RowValues = tuple | SkipRow
"""The values of a row in the order of the columns asked for, or why it has none."""


class Damaged(Exception):
    """A file that cannot be read (any further). It is named in the notes; the others go on."""

    def __init__(self, kind: str):
        self.kind = kind  # completes "skipped 2 ... files"
        super().__init__(kind)


class CutShort(Damaged):
    """One of which the documents before something are used."""

    def __init__(self, end: str = "the damage"):
        super().__init__(end)  # completes "used 2 files up to ..."


class NoColumn(Damaged):
    """A table that lacks a column which the preset names."""

    def __init__(self, column: str, there: list[str]):
        known = "".join(c if c.isprintable() else "?" for c in ", ".join(there))
        known = known if len(known) <= _COLUMNS_SHOWN else f"{known[:_COLUMNS_SHOWN]} ..."
        self.text = f'no column "{column}"; its columns are {known or "none"}'
        super().__init__(f'without the column "{column}"')


class Skips:
    """The accounts of one source."""

    def __init__(self, column_hint: str = ""):
        self._column_hint = column_hint  # what to do where a column is not there
        self.files: dict[str, dict[str, None]] = {}  # kind -> labels, in the order found
        # where they end -> labels of files that are used up to there
        self.cut: dict[str, dict[str, None]] = {}
        self.remarks: dict[str, None] = {}  # what else to say of the files as a whole
        self.lacking = ""  # what the first table without a column has instead
        self._rows: dict[str, dict[str, int]] = {}  # reason -> {shard: how many of its rows}
        self._examples: dict[str, str] = {}  # reason -> the first row
        # file -> {shard: replacement characters in it}
        self._characters: dict[str, dict[str, int]] = {}
        self._other_encoding: dict[str, None] = {}

    def file(self, label: str, error: Exception) -> None:
        """A file that could not be read (any further), by what was raised."""
        if isinstance(error, CutShort):
            self.cut.setdefault(error.kind, {})[label] = None
            return
        if isinstance(error, NoColumn) and not self.lacking:
            self.lacking = f"{label} has {error.text}: {self._column_hint}"
        kind = error.kind if isinstance(error, Damaged) else _kind_of(error)
        self.files.setdefault(kind, {})[label] = None

    def documents(
        self,
        shard: str,
        rows: Iterator[tuple[int, RowValues]],
        make: Callable[[tuple, str], Document | None],
        label: str = "",
    ) -> Iterator[tuple[int, Document]]:
        """(position after it, document) of each row that `make` makes one of; the others are
        counted by reason.

        A later pass over the same shard does not count twice; a resumed one may see only the rest
        of it."""
        counts: dict[str, int] = {}
        for index, row in rows:
            key = f"{label or shard}#{index}"
            try:
                if isinstance(row, SkipRow):
                    raise row
                document = make(row, key)
                if document is None or not document.text.strip():
                    raise SkipRow("no text")
            except Exception as error:
                # SkipRow; or something that nobody thought of, which costs its row
                reason = (
                    str(error)
                    if isinstance(error, SkipRow)
                    else f"not to be read ({type(error).__name__})"
                )
                counts[reason] = counts.get(reason, 0) + 1
                self._examples.setdefault(reason, key)
                found = self._rows.setdefault(reason, {})
                found[shard] = max(found.get(shard, 0), counts[reason])
                continue
            yield index + 1, document

    def text(self, label: str, shard: str, replaced: int, other: bool) -> None:
        """How the bytes of a file became text: so many replacement characters in a part of it, or
        by another encoding."""
        if replaced:
            self._characters.setdefault(label, {})[shard] = replaced
        if other:
            self._other_encoding[label] = None

    @property
    def notes(self) -> list[str]:
        notes = [
            f"skipped {_files(len(labels), kind)}: {_names(labels)}"
            for kind, labels in self.files.items()
        ]
        notes += [
            f"used {_files(len(labels), '')} up to {end}: {_names(labels)}"
            for end, labels in self.cut.items()
        ]
        for reason, found in self._rows.items():
            count = sum(found.values())
            notes.append(
                f"skipped {count} {'row' if count == 1 else 'rows'}: {reason} (the first: "
                f"{self._examples[reason]})"
            )
        if self._characters:
            count = sum(sum(found.values()) for found in self._characters.values())
            notes.append(
                f"{count} replacement {'character' if count == 1 else 'characters'}, for bytes "
                "that are no text, in "
                f"{_files(len(self._characters), '')}: {_names(self._characters)}"
            )
        if self._other_encoding:
            notes.append(f"read as Windows-1252, being no UTF-8: {_names(self._other_encoding)}")
        return notes + [self.lacking] * bool(self.lacking) + list(self.remarks)

    def log_entries(self) -> list[tuple[str, str]]:
        """(file or row, why) for the log. Of a count, its power of ten: it is told again once it
        has grown tenfold."""
        told = [(label, kind) for kind, labels in self.files.items() for label in labels]
        told += [
            (label, f"used up to {end}") for end, labels in self.cut.items() for label in labels
        ]
        for reason, found in self._rows.items():
            told.append(
                (self._examples[reason], f"{at_least(sum(found.values()), 'row')}: {reason}")
            )
        for label, found in self._characters.items():
            told.append(
                (
                    label,
                    f"{at_least(sum(found.values()), 'replacement character')}: bytes that are no "
                    "text",
                )
            )
        return told + [(label, "no UTF-8: read as Windows-1252") for label in self._other_encoding]


def _kind_of(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    return "unreadable" if isinstance(error, OSError) else f"unreadable ({type(error).__name__})"


def _files(count: int, kind: str) -> str:
    if kind.startswith("with"):
        return f"{_files(count, '')} {kind}"
    return " ".join(part for part in (str(count), kind, "file" if count == 1 else "files") if part)


def _names(labels: dict) -> str:
    more = f" and {len(labels) - _NAMES_SHOWN} more" if len(labels) > _NAMES_SHOWN else ""
    return ", ".join(list(labels)[:_NAMES_SHOWN]) + more


def at_least(count: int, what: str) -> str:
    """Its power of ten: who tells a count anew when it changes does so once it has grown
    tenfold."""
    return f"{10 ** (len(str(count)) - 1):,} or more {what}s"
