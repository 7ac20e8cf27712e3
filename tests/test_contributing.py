"""CONTRIBUTING.md: its walks through the code name files and functions that are there, in ten lines
each."""

import ast
import re

import pytest

from tests.project import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
WALKS = {
    heading: re.findall(r"^\d+\. .*(?:\n   .*)*", part, re.MULTILINE)
    for heading, part in re.findall(r"^## (A \w+ on its way .*)\n((?:(?!## ).*\n)*)", TEXT, re.M)
}


def names_in(path: str) -> set[str]:
    """Every function, class and name that a file, or the files of a folder, define."""
    files = [ROOT / path] if path.endswith(".py") else sorted((ROOT / path).glob("*.py"))
    names = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.ImportFrom):
                names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("heading", WALKS)
def test_a_walk_has_ten_lines(heading: str) -> None:
    assert len(WALKS[heading]) == 10


def test_there_are_two_walks() -> None:
    assert len(WALKS) == 2


@pytest.mark.parametrize("line", [line for lines in WALKS.values() for line in lines])
def test_a_walk_goes_past_what_is_there(line: str) -> None:
    code = re.findall(r"`([^`]+)`", line)
    paths = [name for name in code if "/" in name and name.startswith(("core/", "configs/"))]
    assert paths and all((ROOT / path).exists() for path in paths), paths
    defined = set().union(*(names_in(path) for path in paths if path.startswith("core/")))
    functions = [name.removesuffix("()") for name in code if name.endswith("()")]
    assert set(functions) <= defined, set(functions) - defined
    classes = [name for name in code if re.fullmatch(r"[A-Z][A-Za-z]+", name)]
    known = defined | names_in("core/contracts.py")
    assert set(classes) <= known, set(classes) - known
