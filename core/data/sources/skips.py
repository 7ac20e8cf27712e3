"""The account of what a source passed over, and of what it had to read another way: files by kind,
rows by reason, each with an example.

In:    files and rows, as their readers meet them
Out:   notes for a person, and (file, reason) pairs for the log
State: the counts. They grow while reading: opening does not look into every file
"""

from collections.abc import Callable, Iterator

from core.data.documents import Document, SkipRow

_NAMES_SHOWN = 5
_COLUMNS_SHOWN = 300  # characters

RowValues = tuple | SkipRow
"""The values of a row in the order of the requested columns, or why it has none."""


class Damaged(Exception):
    """A file that cannot be read (any further). It is named in the notes; the others go on."""

    def __init__(self, kind: str):
        self.kind = kind  # completes "skipped 2 ... files"
        super().__init__(kind)


class CutShort(Damaged):
    """A damaged file of which the documents before the damage are used."""

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
    """The account of one source."""

    def __init__(self, column_hint: str = ""):
        self._column_hint = column_hint  # advice where a column is missing
        self.files: dict[str, dict[str, None]] = {}  # kind -> labels, in the order found
        # end -> labels of files that are used up to there
        self.cut: dict[str, dict[str, None]] = {}
        self.remarks: dict[str, None] = {}  # other notes on the files as a whole
        self.lacking = ""  # the columns of the first table that lacks one
        self._rows: dict[str, dict[str, int]] = {}  # reason -> {shard: number of its rows}
        self._examples: dict[str, str] = {}  # reason -> the first row
        # file -> {shard: replacement characters in it}
        self._characters: dict[str, dict[str, int]] = {}
        self._other_encoding: dict[str, None] = {}

    def file(self, label: str, error: Exception) -> None:
        """Count a file that could not be read (any further), by the error that it raised."""
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
        """Yield (position after it, document) for each row of which `make` makes a document, and
        count the others by reason.

        A later pass over the same shard does not count twice; a resumed one may see only the rest
        of the shard."""
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
                # SkipRow; or an unforeseen error, which costs only this row
                reason = (
                    str(error)
                    if isinstance(error, SkipRow)
                    else f"not to be read ({type(error).__name__})"
                )
                counts[reason] = counts.get(reason, 0) + 1
                self._examples.setdefault(reason, key)
                of_shards = self._rows.setdefault(reason, {})
                of_shards[shard] = max(of_shards.get(shard, 0), counts[reason])
                continue
            yield index + 1, document

    def text(self, label: str, shard: str, replaced: int, other: bool) -> None:
        """Note how the bytes of a file became text: the replacement characters in one of its parts,
        and whether it has another encoding."""
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
        for reason, counts in self._rows.items():
            count = sum(counts.values())
            rows = "row" if count == 1 else "rows"
            notes.append(f"skipped {count} {rows}: {reason} (the first: {self._examples[reason]})")
        if self._characters:
            count = sum(sum(counts.values()) for counts in self._characters.values())
            characters = "character" if count == 1 else "characters"
            notes.append(
                f"{count} replacement {characters}, for bytes that are no text, in "
                f"{_files(len(self._characters), '')}: {_names(self._characters)}"
            )
        if self._other_encoding:
            notes.append(f"read as Windows-1252, being no UTF-8: {_names(self._other_encoding)}")
        return notes + [self.lacking] * bool(self.lacking) + list(self.remarks)

    def log_entries(self) -> list[tuple[str, str]]:
        """Return (file or row, reason) for the log. A count is given as its power of ten, so that
        it makes a new entry once it has grown tenfold."""
        entries = [(label, kind) for kind, labels in self.files.items() for label in labels]
        for end, labels in self.cut.items():
            entries += [(label, f"used up to {end}") for label in labels]
        for reason, counts in self._rows.items():
            count = at_least(sum(counts.values()), "row")
            entries.append((self._examples[reason], f"{count}: {reason}"))
        for label, counts in self._characters.items():
            count = at_least(sum(counts.values()), "replacement character")
            entries.append((label, f"{count}: bytes that are no text"))
        entries += [(label, "no UTF-8: read as Windows-1252") for label in self._other_encoding]
        return entries


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
    """Return a count's power of ten in words: a log that repeats a changed count does so once it
    has grown tenfold."""
    return f"{10 ** (len(str(count)) - 1):,} or more {what}s"
