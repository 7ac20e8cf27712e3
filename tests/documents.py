"""README, guide and playbooks as the tests read them: fenced blocks, tables, and the files that a
block names."""

import re
from dataclasses import dataclass

from tests.project import ROOT

README, GUIDE = (ROOT / "README.md").read_text(), (ROOT / "docs" / "guide.md").read_text()
FENCE = re.compile(r"^(?:<!-- (.*) -->\n)?( *)```(\w+)\b *(.*)\n((?:.*\n)*?)\2```$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block, also of one inside a list."""

    note: str  # the comment on the line before it: what makes it, or what holds it true
    language: str
    info: str  # what stands behind the language
    code: str


def fenced(text: str) -> list[Block]:
    return [
        Block(
            note,
            language,
            info,
            "".join(line.removeprefix(indent) for line in code.splitlines(True)),
        )
        for note, indent, language, info, code in FENCE.findall(text)
    ]


def block_of(text: str, first_words: str) -> str:
    """The code of the one block that begins so."""
    (code,) = [block.code for block in fenced(text) if block.code.startswith(first_words)]
    return code


def table(text: str, *head: str) -> list[list[str]]:
    """The rows of the one table whose first headings begin so."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    split = [
        [[c.strip() for c in re.split(r"(?<!\\)\|", row.strip("|"))] for row in each.splitlines()]
        for each in tables
    ]
    (rows,) = [
        rows
        for rows in split
        if len(rows[0]) >= len(head) and all(c.startswith(h) for c, h in zip(rows[0], head))
    ]
    return rows[2:]


def named(cell: str) -> list[str]:
    """What stands in backquotes in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def files_named(code: str, **values: str) -> list[str]:
    """The paths in a block of files and their meaning: "logs/<lineage>/report.html, report.md   the
    report" names two.

    values   what stands for <lineage>, <variant> ...
    """
    found: list[str] = []
    folder = ""
    for line in code.splitlines():
        names = re.match(r"\s*([^\s,]+(?:, [^\s,]+)*)", line)[1].split(", ")  # type: ignore[index]
        folder = folder if line.startswith(" ") else names[0].rpartition("/")[0]
        for name in names:
            if name.startswith("_"):  # "t_current.pth, _prev.pth"
                name = f"{found[-1].rpartition('_')[0]}{name}"
            elif "/" not in name and name != "...":
                name = f"{folder}/{name}"
            found += [name] if name != "..." else []
    for key, value in values.items():
        found = [name.replace(f"<{key}>", value) for name in found]
    return [name.rstrip("/") for name in found]
