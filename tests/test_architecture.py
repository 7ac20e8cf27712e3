"""The floors of the design: imports go down or stay inside their package, nothing goes in a circle,
importing does nothing."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = [
    "core.errors",
    "core.file_names",
    "core.files",
    "core.bounds",
    "core.randomness",
    "core.signals",
    "core.terminal",
    "core.contracts",
    "core.environment",
    "core.optional_packages",
    "core.runtime",
    "core.schedules",
    "core.hf_hub",
    "core.metrics",
    "core.parallel",
    "core.preset",
    "core.losses",
    "core.data",
    "core.checkpoint",
    "core.comparison",
    "core.models",
    "core.interpretation",
    "core.heads",
    "core.generation",
    "core.training",
    "core.evaluation",
    "core.assembly",
    "core.trained",
    "core.ui",
    "core.reports",
    "core.export",
    "core.jobs",
    "core.registry",
    "core.api",
    "core.preview",
    "core.launch",
    "main",
]
"""From the ground up: every package and every file of core/, each on a floor of its own."""
MAX_LINES, MAX_FUNCTION_LINES = 450, 60
SLOW_PACKAGES = [
    "torch",
    "datasets",
    "transformers",
    "tokenizers",
    "pyarrow",
    "pymupdf",
    "matplotlib",
    "scipy",
    "wandb",
]
SLOW_PACKAGES += ["prompt_toolkit"]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path for path in [ROOT / "main.py", *sorted((ROOT / "core").rglob("*.py"))]
}


def part_of(module: str) -> str:
    """The entry of FLOORS a module belongs to: "core.data.sources.pdf" to "core.data"."""
    return ".".join(module.split(".")[:2])


def imports(module: str) -> list[tuple[str, int]]:
    """(module of ours, line) of every import in a file, those inside functions and under conditions
    included."""
    found = []
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively"
            found += [
                (
                    full if (full := f"{node.module}.{alias.name}") in FILES else str(node.module),
                    node.lineno,
                )
                for alias in node.names
            ]
    return [(name, line) for name, line in found if name in FILES and name != "core"]


GRAPH = {module: imports(module) for module in FILES}
MODULES = [module for module in FILES if module != "core"]


@pytest.mark.parametrize("module", MODULES)
def test_every_file_has_a_floor_and_imports_only_go_down(module: str) -> None:
    """An import stays in its own package, or goes to a lower floor."""
    assert part_of(module) in FLOORS, f"{module} stands on no floor: give it one here"
    own = FLOORS.index(part_of(module))
    for target, line in GRAPH[module]:
        floor = FLOORS.index(part_of(target))
        assert floor <= own, f"{module}:{line} imports {target}: up from floor {own} to {floor}"


def test_every_floor_is_of_something() -> None:
    """A floor of a file that is gone is a mistake in this table."""
    gone = [name for name in FLOORS if name not in FILES]
    assert not gone


def test_imports_go_in_no_circle() -> None:
    """Not between any modules, not even through imports inside functions."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, "imports in a circle: " + " -> ".join(
            [*path[path.index(module) :], module]
        )
        if module not in done:
            for target, _ in GRAPH[module]:
                visit(target, [*path, module])
            done.add(module)

    for module in FILES:
        visit(module, [])


def test_the_checks_see_imports_inside_functions() -> None:
    """main.py imports core.launch only inside main(): the graph must know it, or the checks above
    check nothing."""
    assert "core.launch" in [target for target, _ in GRAPH["main"]]


@pytest.mark.parametrize("module", FILES)
def test_files_stay_short(module: str) -> None:
    """One file, one idea: beyond this length there is a seam to be found."""
    lines = len(FILES[module].read_text().splitlines())
    assert lines <= MAX_LINES


SCRIPTS = [
    *ROOT.glob("*.py"),
    *(p for d in ("core", "tests", "benchmarks", "docs") for p in (ROOT / d).rglob("*.py")),
]


def test_functions_and_test_files_stay_short() -> None:
    """Limits are met by seams; tests and benchmarks keep them, too."""
    for path in SCRIPTS:
        text = path.read_text()
        assert len(text.splitlines()) <= MAX_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= MAX_FUNCTION_LINES, f"{path}: {node.name} has {lines} lines"


def in_fresh_python(code: str, folder: Path) -> dict:
    """What a script prints last, as JSON; it must print nothing else."""
    run = [sys.executable, "-B", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_what_data_workers_run_needs_no_torch(tmp_path: Path) -> None:
    """Reading, mixing, tokenizing and packing stay free of torch, and slow libraries wait until
    they are used."""
    light = [
        m
        for m in MODULES
        if part_of(m) == "core.data" and m not in ("core.data.loader", "core.data.reader")
    ]
    light += [
        "core.preset.decode",
        "core.preset.settings",
        "core.schedules",
        "core.errors",
        "core.randomness",
    ]
    code = f"""
import importlib, json
loaded = {{}}
for module in {light!r}:
    importlib.import_module(module)
    loaded[module] = [name for name in {SLOW_PACKAGES!r} if name in sys.modules]
print(json.dumps({{"loaded": loaded}}))
"""
    loaded = in_fresh_python(code, tmp_path)["loaded"]
    assert "core.data.pipeline" in loaded and "core.data.sources" in loaded
    assert {module: names for module, names in loaded.items() if names} == {}


def test_models_import_no_data(tmp_path: Path) -> None:
    """Nobody who wants a model alone waits for what reads data or compares runs."""
    code = """
import json, sys
import core.models
heavy = ("pandas", "pyarrow", "datasets", "transformers", "tokenizers")
ours = ("core.data", "core.comparison", "core.interpretation", "core.training", "core.jobs")
ours += ("core.preset.base",)
print(json.dumps({"loaded": [name for name in (*heavy, *ours) if name in sys.modules]}))
"""
    assert in_fresh_python(code, tmp_path) == {"loaded": []}


def test_importing_does_nothing(tmp_path: Path) -> None:
    """No file, no device, no thread, no signal handler, no output; optional packages wait until
    they are used."""
    code = f"""
import importlib, json, signal, threading
before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
for module in {MODULES!r}:
    importlib.import_module(module)
import torch
print(json.dumps({{
    "threads": threading.active_count(),
    "device": torch.cuda.is_initialized(),
    "group": torch.distributed.is_initialized(),
    "signals": before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
    "slow": [name for name in {SLOW_PACKAGES!r} if name != "torch" and name in sys.modules],
}}))
"""
    assert in_fresh_python(code, tmp_path) == {
        "threads": 1,
        "device": False,
        "group": False,
        "signals": True,
        "slow": [],
    }
    assert list(tmp_path.iterdir()) == []
