"""Every number in README and guide that was measured has a command that measures it again, and an
entry in docs/LOG.md."""

import re

import pytest

from tests.documents import GUIDE, README, named, table
from tests.project import ROOT

LOG = (ROOT / "docs" / "LOG.md").read_text()
ROWS = table(
    (ROOT / "docs" / "measurements.md").read_text(), "What is said", "Command", "Entry of LOG.md"
)
SAID = [" ".join(row[0].split()) for row in ROWS]
UNIT = r"(?:x |times (?:as|the|a)\b|times here|nats\b|s[.,;]| s\b| % of\b| % real)"
REFERENCES = ("has measurements", "has details, spreads and limits")  # which say what LOG.md is
CLAIM = re.compile(rf"\d[\d.,]*(?: to \d[\d.,]*)? ?{UNIT}")


def flat(text: str) -> str:
    return " ".join(text.split())


def paragraphs(text: str) -> list[str]:
    """Paragraphs and items of lists, each in one line; without code and tables."""
    text = re.sub(r"^ *```[\s\S]*?^ *```$|^\|.*$", "", text, flags=re.MULTILINE)
    return [flat(part) for part in re.split(r"\n\n+|\n(?=- )", text) if part.strip()]


def test_every_sentence_stands_in_a_document() -> None:
    both = flat(README) + flat(GUIDE)
    gone = [said for said in SAID if said not in both]
    assert len(SAID) > 20 and not gone, f"correct docs/measurements.md: no longer said: {gone}"


def test_every_command_and_entry_is_there() -> None:
    entries = {
        heading: body
        for heading, body in re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", LOG, re.MULTILINE)
    }
    for said, commands, entry in ROWS:
        assert entry in entries, f"{said}: LOG.md has no entry {entry}"
        names = [name for name in named(commands) if name != "seconds_to_first_step"]
        assert names, said
        for name in names:
            path = ROOT / (name if "/" in name else f"configs/{name}.json")
            assert path.exists(), f"{said}: there is no {path}"


@pytest.mark.parametrize("text", [README, GUIDE], ids=["README", "guide"])
def test_every_measured_number_is_listed(text: str) -> None:
    """What has the form of a measurement, and what sends its reader to LOG.md for one."""
    for part in paragraphs(text):
        covered = [said for said in SAID if said in part]
        rest = part
        for said in covered:
            rest = rest.replace(said, "")
        assert not CLAIM.search(rest), (
            f"not in docs/measurements.md: {CLAIM.findall(rest)} in {part}"
        )
        assert covered or "LOG.md" not in part or any(words in part for words in REFERENCES), (
            f"not in docs/measurements.md: {part}"
        )


def test_each_item_of_what_the_readme_measured_is_listed() -> None:
    items = [
        part
        for part in paragraphs(README.split("## Measured")[1].split("\n## ")[0])
        if part.startswith("- ")
    ]
    assert len(items) >= 8
    assert not [item for item in items if not any(said in item for said in SAID)]
