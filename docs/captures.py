"""`python docs/captures.py`: runs the real program and writes what it shows into README.md and
docs/guide.md.

`python docs/captures.py NAME ...` makes only these, and `--check` writes nothing and says which are
no longer what the program shows. All of them take about ten minutes on two cores, the comparison
most of it; the others are made in two.

In:    the program, in a temporary copy of the project without checkpoints, logs or a network; a
       terminal 100 columns wide
Out:   the fenced blocks below a line `<!-- made by: python docs/captures.py NAME -->`
State: none. tests/test_captures.py fails when a block has another shape than what the program shows
now"""

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from docs.terminal import show  # noqa: E402

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "guide.md")
BLOCK = re.compile(
    r"^<!-- made by: python docs/captures.py (\w+) -->\n```text\n(.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SOURCES = "sources share weight loss documents epoch"
UP, ENTER = "\x1b[A", "\r"

BAD_PRESET = {
    "model": {"hidden_size": "256", "num_layer": 3},
    "train": {"max_steps": 0},
    "data": {"sources": ["wikipeda"]},
}


def menu(folder: Path) -> list[str]:
    """The menu as it opens."""
    return show("python main.py", folder, keys=[("starts fresh", "")])[0]


def quick_test(folder: Path) -> list[str]:
    """The end of the quick test."""
    return ended(show("echo 90_quick_test | python main.py", folder, rows=48))


def comparison(folder: Path) -> list[str]:
    """The end of a comparison."""
    return ended(show("echo 38_cosine_compare_cpu | python main.py", folder))


def mistakes(folder: Path) -> list[str]:
    """Show the answer to a preset with mistakes."""
    path = folder / "configs" / "t_bad.json"
    path.write_text(json.dumps(BAD_PRESET))
    lines, _ = show("echo t_bad | python main.py", folder)
    path.unlink()
    return [line.replace(f"{folder}/", "") for line in lines if line]


def conversation(folder: Path) -> list[str]:
    """Typing to the model of the quick test, which is trained first where it is not there."""
    if not (folder / "checkpoints" / "90_quick_test_current.pth").exists():
        quick_test(folder)
    typed = ["/max 12", "The history of", "/temperature 0.3", "/quit"]
    keys = [("starts fresh", UP + UP + ENTER), *(("> ", line + ENTER) for line in typed)]
    return ended(show("python main.py", folder, keys=keys))


# made in this order: the first ones want a project without checkpoints
CAPTURES: dict[str, Callable[[Path], list[str]]] = {
    "menu": menu,
    "mistakes": mistakes,
    "quick_test": quick_test,
    "conversation": conversation,
    "comparison": comparison,
}


def ended(shown: tuple[list[str], int | None]) -> list[str]:
    lines, code = shown
    if code != 0:
        raise SystemExit("\n".join([*lines, f"ended with exit code {code}"]))
    return lines


def copy_of_the_project(folder: Path) -> Path:
    """Copy what the program needs, as a fresh checkout has it."""
    for name in ("core", "configs", "pdfs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "main.py", folder / "main.py")
    return folder


def blocks(text: str) -> dict[str, list[str]]:
    """Name -> lines of the captures in a document."""
    return {name: block.splitlines() for name, block in BLOCK.findall(text)}


def with_block(text: str, name: str, lines: list[str]) -> str:
    """The document with one of its captures made anew."""
    made = "\n".join(lines)
    return BLOCK.sub(
        lambda found: (
            found[0].replace(f"\n{found[2]}```", f"\n{made}\n```") if found[1] == name else found[0]
        ),
        text,
    )


def shape(lines: list[str]) -> list[str]:
    """Reduce a screen to what does not depend on time, machine or luck: the words, without numbers,
    bars, curves and what a model says."""
    sections: list[list[str]] = [[]]
    said = False  # by a model: below a prompt, or a heading of samples
    for line in lines:
        if line.startswith(("── ", "> ")):
            sections.append([])
            said = line.startswith(("── sample", "> ")) and not line.startswith("> /")
        elif said and not line.startswith("finished"):
            continue
        line = re.sub(r"(^ +on |\d[kMG]? parameters +)\w.*$", r"\1", line)  # the machine
        line = re.sub(r"[▁▂▃▄▅▆▇█━╸╺·─]+", " ", line)
        line = re.sub(r"[-−+]?\d[\d.,]*(e-\d+)?[kMGsmh]?\b", "#", line)
        line = re.sub(r"#(\s#)+", "#", " ".join(line.split()))
        sections[-1] += [line] if line.strip("# ") else []
    # sources stand by their shares, which depend on how long the texts of this machine's Python are
    return [
        line for found in sections for line in (sorted(found) if found[:1] == [SOURCES] else found)
    ]


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    names = [name for name in arguments if name != "--check"] or list(CAPTURES)
    if unknown := sorted(set(names) - set(CAPTURES)):
        print(
            f"no capture is called {', '.join(unknown)}; there are {', '.join(CAPTURES)}",
            file=sys.stderr,
        )
        return 2
    differing = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = copy_of_the_project(Path(temporary) / "project")
        for name in [name for name in CAPTURES if name in names]:
            lines = CAPTURES[name](folder)
            for document in DOCUMENTS:
                text = document.read_text(encoding="utf-8")
                if name not in blocks(text):
                    continue
                if shape(blocks(text)[name]) != shape(lines):
                    differing.append(name)
                if not check:
                    document.write_text(with_block(text, name, lines), encoding="utf-8")
            print(f"{name}: {'has changed' if name in differing else 'as before'}", flush=True)
    return 1 if check and differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
