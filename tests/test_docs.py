"""What the documents promise: commands, links, keys and examples are true, and what is generated is
current.

When a test here says that a file is not current, run `python docs/make_schema.py`."""

import ast
import html
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from core import errors
from core.data import unlearned
from core.preset.decode import read_preset
from core.registry import Preset
from tests.documents import block_of, files_named, table
from tests.json_schema import problems
from tests.preset.test_decode import AUXILIARY_003, QA_PLUS_WIKI_003
from tests.project import NO_HUB, ROOT, Project
from tests.test_listings import RUN

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README, GUIDE = (ROOT / "README.md").read_text(), (ROOT / "docs" / "guide.md").read_text()
SCHEMA = json.loads((ROOT / "configs" / "preset.schema.json").read_text())
MAKE = "run: python docs/make_schema.py"

make_schema = runpy.run_path(str(ROOT / "docs" / "make_schema.py"))
captures = runpy.run_path(str(ROOT / "docs" / "captures.py"))
make_pdf = runpy.run_path(str(ROOT / "docs" / "make_pdf.py"))
MARGIN = make_pdf["MARGIN"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[tuple[str, str]]:
    """(what stands behind the language, the code) of every fenced block, also of one inside a
    list."""
    found = re.findall(rf"^( *)```{language}\b *(.*)\n((?:.*\n)*?)\1```$", text, re.MULTILINE)
    return [
        (info, "".join(line.removeprefix(indent) for line in code.splitlines(True)))
        for indent, info, code in found
    ]


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The link targets GitHub gives headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# commands and links -------------------------------------------------------------------------------


def test_the_readme_sets_everything_up_in_two_commands() -> None:
    """And .ci/run, which a fresh machine runs, has the test command word for word."""
    commands = [line for _, code in blocks(README, "bash") for line in code.splitlines()]
    install = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
    tests = f"{install}.venv/bin/python -m pytest -n 2 --dist worksteal"
    assert f"{install}.venv/bin/python main.py" in commands and tests in commands
    ci = (ROOT / ".ci" / "run").read_text()
    assert f"{tests}\n" in ci
    assert "echo 90_quick_test | .venv/bin/python main.py" in commands
    assert "echo 90_quick_test | .venv/bin/python main.py\n" in ci
    told = re.findall(r"\.ci/run.*(?:\n.*)?", README)
    assert len(told) == 2 and all(
        "poisoned memory" in part and "other processors" in part for part in told
    ), told


@pytest.mark.parametrize(
    "text, heading", [(README, "Exit code"), (GUIDE, "Code")], ids=["README", "guide"]
)
def test_every_exit_code_has_its_meaning(text: str, heading: str) -> None:
    """Those of the errors, of a good end, and Python's own for a traceback."""
    codes = {
        error.exit_code
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.UserError)
    }
    assert {int(code) for code, _ in table(text, heading, "Meaning")} == codes | {0, 1}


def test_troubleshooting_names_what_the_program_prints() -> None:
    told = unlearned.Unlearned(learned=True, of_chance=False)
    told.show("")
    (heading,) = re.findall(r"^\*\*(A step was passed over[^*]*)\.\*\*", GUIDE, re.MULTILINE)
    assert all(part in str(told.warning) for part in heading.lower().split(": "))


def test_the_ci_script_is_a_script_that_runs_anywhere() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, "chmod +x .ci/run"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    for file in (script, ROOT / "requirements.txt"):
        assert not re.search(
            r"/(work|home|root|opt|Users)/|https?://|--index|--find-links", file.read_text()
        ), file


def test_no_merge_is_left_half_done() -> None:
    texts = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "pyproject.toml"]
    texts += [
        p for folder in ("core", "docs", "tests") for p in (ROOT / folder).rglob("*.[mp][dy]")
    ]
    marks = ("<<<<" + "<<<", "====" + "===\n", ">>>>" + ">>>")
    assert [path for path in texts if any(f"\n{mark}" in path.read_text() for mark in marks)] == []


LINUX = '; sys_platform == "linux"'


def test_requirements_are_exact() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wrong = [
        line
        for line in lines
        if line
        and not line.startswith("#")
        and not re.fullmatch(rf"[\w-]+==[\d.]+({LINUX})?", line)
    ]
    assert not wrong


def test_requirements_are_complete() -> None:
    """Every package that is imported is asked for; in pyproject.toml too, apart from what only
    tests need."""
    imported = set()
    for path in [ROOT / "main.py", *(ROOT / "core").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    ours = {path.name for path in ROOT.iterdir() if path.is_dir()} | {
        path.stem for path in ROOT.glob("*.py")
    }
    optional = {"wandb", "flash_attn", "llama_cpp"}
    needed = imported - set(sys.stdlib_module_names) - ours - optional
    pinned = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert needed <= pinned, needed - pinned
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [project["dependencies"], *project["optional-dependencies"].values()]
    assert needed <= {re.split(r"[<>=]", line)[0] for lines in ranges for line in lines}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(there.read_text()), f"{target}: no such heading"


def test_the_readme_names_every_file() -> None:
    """The tree under "What is where": nothing that is gone, nothing of core/ missing."""
    tree = re.search(r"## What is where\n.*?\n```text\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    named = [name for line in tree[1].splitlines() for name in re.split(r"\s{2,}", line)[0].split()]
    assert not [name for name in named if not (ROOT / name).exists()]
    parts = [
        path
        for path in (ROOT / "core").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    there = {
        f"core/{path.name}{'/' if path.is_dir() else ''}"
        for path in parts
        if path.name != "__init__.py"
    }
    assert there <= set(named), f"not in the README's tree: {sorted(there - set(named))}"


# keys and examples --------------------------------------------------------------------------------


def schema_keys() -> set[str]:
    definitions = [SCHEMA, *SCHEMA["$defs"].values()]
    return {key for definition in definitions for key in definition["properties"]}


def test_every_key_is_in_the_guide() -> None:
    missing = [key for key in sorted(schema_keys()) if f"`{key}`" not in GUIDE]
    assert not missing, f"{missing} not in docs/guide.md; {MAKE}"


def json_examples() -> list[Any]:
    examples = []
    for path in DOCUMENTS:
        codes = [code for _, code in blocks(path.read_text(), "json")]
        examples += [
            pytest.param(code, id=f"{name_of(path)}-{number}") for number, code in enumerate(codes)
        ]
    return examples


@pytest.mark.parametrize("code", json_examples())
def test_examples_are_presets(code: str, tmp_path: Path) -> None:
    """Every JSON block is a preset that decodes, apart from kinds that its playbook adds; those are
    run below."""
    example = json.loads(code)
    named = re.findall(r'"(?:type|job)": "(\w+)"', code) + re.findall(r'"enable_(\w+)"', code)
    if {"ngram", "focal", "docstrings", "survey", "remaining"} & set(named):
        return
    assert not problems(example, SCHEMA), problems(example, SCHEMA)
    for preset in (ROOT / "configs").glob("*.json"):
        (tmp_path / preset.name).write_text(preset.read_text())
    (tmp_path / "example.json").write_text(code)
    read_preset(tmp_path / "example.json", Preset)


def test_the_schema_accepts_the_examples_of_specification_003() -> None:
    """Both of them, word for word: the preset, and the auxiliary section in it.
    tests/preset/test_decode.py decodes them."""
    preset = json.loads(QA_PLUS_WIKI_003)
    assert not problems(preset, SCHEMA)
    assert not problems(preset | json.loads(f"{{{AUXILIARY_003}}}"), SCHEMA)


# the schema ---------------------------------------------------------------------------------------


def test_the_schema_is_current() -> None:
    assert (ROOT / "configs" / "preset.schema.json").read_text() == make_schema["schema_text"](), (
        MAKE
    )


def test_the_reference_is_current() -> None:
    assert make_schema["guide_text"](GUIDE) == GUIDE, MAKE


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("[!p]*.json")), ids=lambda path: path.stem
)
def test_the_schema_accepts_every_preset(path: Path) -> None:
    preset = json.loads(path.read_text())
    assert not problems(preset, SCHEMA)
    assert preset.get("$schema") == "./preset.schema.json", (
        "an editor finds the schema by this line"
    )


MINIMAL: dict[str, Any] = {"data": {"sources": ["python_stdlib"]}}


@pytest.mark.parametrize(
    "preset",
    [
        MINIMAL,
        MINIMAL
        | {
            "$schema": "./preset.schema.json",
            "tokenizer": "gpt2",
            "train": {"learning_rate": 1, "betas": [0.9, 0.99]},
        },
        MINIMAL
        | {
            "losses": [
                {"type": "cross_entropy", "weight": [{"from": 1, "to": 0, "shape": "cosine"}]}
            ]
        },
        {"extends": "00_best_general", "model": {"hidden_size": 128}},
        {"extends": "00_best_general", "data": {"packing": "padding"}},
    ],
)
def test_the_schema_accepts_what_the_program_accepts(preset: dict) -> None:
    assert not problems(preset, SCHEMA)


@pytest.mark.parametrize(
    "preset",
    [
        {},
        {"data": {}},
        {"data": {"sources": []}},
        {"data": {"sources": ["wikipeda"]}},
        {"data": {"sources": [{"path": "./texts"}]}},
        {"data": {"sources": [{"type": "hf"}]}},
        MINIMAL | {"modle": {}},
        MINIMAL | {"model": {"num_layer": 3}},
        MINIMAL | {"train": {"max_steps": 0}},
        MINIMAL | {"train": {"learning_rate": "fast"}},
        MINIMAL | {"losses": [{"weight": 1.0}]},
        MINIMAL | {"lineage": "a/b"},
    ],
)
def test_the_schema_refuses_what_the_program_refuses(preset: dict) -> None:
    assert problems(preset, SCHEMA)


# the PDF ------------------------------------------------------------------------------------------


def letters(text: str) -> str:
    """Text without white space: the same in the primer and in its PDF, wherever lines break."""
    return "".join(text.split())


def test_the_pdf_is_the_primer() -> None:
    """Letter by letter: everything that the primer says can be read in the PDF, in its order."""
    pymupdf = pytest.importorskip("pymupdf")
    primer = (ROOT / "docs" / "primer.md").read_text()
    with pymupdf.open(ROOT / "pdfs" / "primer.pdf") as document:
        body = pymupdf.Rect(0, 0, document[0].rect.width, document[0].rect.height - MARGIN)
        shown = letters("".join(page.get_text(clip=body, flags=0) for page in document))
    said = html.unescape(re.sub(r"<[^>]+>", "", make_pdf["to_html"](primer)))
    assert shown == letters(said), "run: python docs/make_pdf.py"
    assert not set("#`") & set(said), "the primer uses Markdown that docs/make_pdf.py does not know"


def test_the_pdf_does_not_grow() -> None:
    """It is in every clone: small, and made anew only when the primer changes."""
    assert (ROOT / "pdfs" / "primer.pdf").stat().st_size < 60_000


def test_nothing_sticks_out_of_a_page() -> None:
    pymupdf = pytest.importorskip("pymupdf")
    with pymupdf.open(ROOT / "pdfs" / "primer.pdf") as document:
        assert document.page_count >= 4 and len(document.get_toc()) > 8
        for page in document:
            right = max(word[2] for word in page.get_text("words"))
            assert right < page.rect.width - MARGIN + 5, f"page {page.number + 1}"


# the program, as the documents tell of it ---------------------------------------------------------


def run_the_guides_python(project: Project) -> None:
    """The Python of the guide works with what the quick test has trained; the guide names every
    key of its checkpoint."""
    (code,) = [code for info, code in blocks(GUIDE, "python") if info == "run=after-quick-test"]
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project.folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert printed.returncode == 0 and printed.stdout.strip(), printed.stderr
    (paragraph,) = [
        part for part in GUIDE.split("\n\n") if part.startswith("A checkpoint is a dict")
    ]
    assert [
        key for key in project.checkpoint(lineage="90_quick_test") if f"`{key}`" not in paragraph
    ] == []


@pytest.mark.slow
def test_the_quick_test_and_the_code_of_the_guide(tmp_path: Path) -> None:
    """The README's command runs without a network, on a terminal shows what README shows, and
    leaves the files that the documents name; the guide's conversation, its Python and its shell
    commands work with the model."""
    project = Project(captures["copy_of_the_project"](tmp_path / "project"))
    shown = {
        name: lines for text in (README, GUIDE) for name, lines in captures["blocks"](text).items()
    }
    for name in ("quick_test", "conversation"):
        assert captures["shape"](captures[name](project.folder)) == captures["shape"](
            shown[name]
        ), "run: python docs/captures.py"
    assert project.steps("90_quick_test") == list(range(1, 21))
    assert set(project.events("step", "90_quick_test")[-1]["sources"]) == {"python_stdlib", "pdf"}
    run_the_guides_python(project)
    logs = project.folder / "logs"
    left = {
        path.relative_to(project.folder).as_posix()
        for path in [*logs.glob("*/*"), *project.folder.glob("checkpoints/*")]
    }
    for text, first_words in (
        (README, "checkpoints/"),
        (GUIDE, "checkpoints/<lineage>_current.pth, "),
    ):
        named = files_named(block_of(text, first_words), lineage="90_quick_test")
        assert left <= set(named), "a file of a run is not named"
        # other presets', or a second start's
        later = {"prev.pth", "prev2.pth", "sharded", "masked.png", "wandb", "tokens", "pdf"}
        assert all(
            (project.folder / name).exists() or re.split(r"[/_]", name)[-1] in later
            for name in named
        ), named
    for lineage in ("my_mix", "first", "second"):
        (logs / lineage).symlink_to(logs / "90_quick_test")
    (project.folder / ".venv").symlink_to(sys.prefix)
    for command in RUN:
        done = subprocess.run(
            command,
            shell=True,
            cwd=project.folder,
            env=os.environ | NO_HUB,
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() and "rror" not in done.stdout + done.stderr.replace(
            "No such file", ""
        ), (command, done)
    fields = {event["event"]: set(event) for event in project.events(lineage="90_quick_test")}
    for name, keys in fields.items():
        (row,) = [line for line in GUIDE.splitlines() if line.startswith(f"| `{name}` |")]
        assert not [
            key for key in keys - {"event", "step", "tokens", "time"} if f"`{key}`" not in row
        ], f"{name}: {row}"
