"""The interpret job: from a checkpoint to its page; refusals; stopping."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import Interrupted, UserError
from core.jobs.interpret import interpret, preview_interpret, rows_of
from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.registry import Preset
from core.reports.interpretation.content import CAPTIONS
from core.runtime import detect_runtime
from core.signals import StopRequest
from tests.documents import GUIDE, block_of, files_named
from tests.project import TINY_SIZES, Project, merged, story, tiny_preset, train_here

ROUTED = {"type": "polychromatic", **TINY_SIZES, "seq_length": 32}
SOURCES = [
    {"type": "text", "path": "texts", "name": "stories"},
    {"type": "text", "path": "lists", "name": "numbers"},
]


def preset(**changes: Any) -> dict:
    """A preset that trains a tiny routed model for two steps."""
    own = {
        "model": ROUTED,
        "data": {"sources": SOURCES},
        "train": {"max_steps": 2},
        "interpret": {"tokens_per_category": 600},
    }
    return merged(tiny_preset(**own), changes)


def write_lists(root: Path) -> None:
    """A second category: columns of figures."""
    (root / "lists").mkdir(parents=True, exist_ok=True)
    for i in range(120):
        (root / "lists" / f"list{i:03}.txt").write_text(
            "\n".join(f"{i * 37 + j * j} {j * i}" for j in range(30))
        )


def decoded(stem: str = "look", **changes: Any) -> Any:
    return decode_preset(
        preset(**{"job": "interpret", "init_from": "t", **changes}), Preset, stem, stem
    )


def look(root: Path, stem: str = "look", **changes: Any) -> str:
    """Run the job in this process; what it said."""
    console = io.StringIO()
    interpret(decoded(stem, **changes), detect_runtime(), Single(), root, 0.0, console)
    return console.getvalue()


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than all the rest; tests/interpretation looks at them, and a start of the
    program below."""
    monkeypatch.setattr(
        "core.reports.interpretation.figures.figures",
        lambda found: dict.fromkeys(CAPTIONS, b"a picture"),
    )


def trained(root: Path, **changes: Any) -> Path:
    write_lists(root)
    train_here(preset(**changes), root)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("interpret"), data={"validation_fraction": 0.05})


def test_a_trained_model_is_interpreted(root: Path) -> None:
    said = look(root)
    folder = root / "logs" / "look" / "interpret"
    assert {path.name for path in folder.iterdir()} == {
        *CAPTIONS,
        "entropy_stats.json",
        "interpret.json",
        "index.html",
    }
    named = files_named(block_of(GUIDE, "logs/<lineage>/interpret/index.html"), lineage="look")
    assert {root / name for name in named} == set(folder.iterdir()), (
        "the guide names what it leaves"
    )
    assert (
        "page: logs/look/interpret/index.html" in said and "layer" in said and "most weight" in said
    )
    told = json.loads((folder / "interpret.json").read_text())
    assert (told["weights"], told["step"], told["pool"], told["tau"]) == (
        "t_current.pth",
        2,
        "causal",
        pytest.approx(0.1),
    )
    stories, figures = told["categories"]
    assert (stories["name"], stories["documents"]) == ("stories", 2), (
        "5 % of 40 documents are held out"
    )
    assert figures["name"] == "numbers" and figures["documents"] >= 6
    assert 600 <= stories["tokens"] < 632 and told["noise_over"] == "rows"
    saved = torch.load(root / "checkpoints" / "t_current.pth", weights_only=True)["model"]
    layers = [torch.softmax(saved[f"model_core.{i}.polyglu.alpha"].double(), -1) for i in range(2)]
    expected = [float(-(p * (p + 1e-10).log()).sum(-1).mean()) for p in layers]
    assert json.loads((folder / "entropy_stats.json").read_text())[
        "per_layer_mean"
    ] == pytest.approx(expected, abs=1e-6)


def test_the_numbers_are_the_same_again_and_the_checkpoint_is_left_alone(root: Path) -> None:
    before = {path: path.read_bytes() for path in (root / "checkpoints").iterdir()}
    found = []
    for stem in ("one", "two"):
        look(root, stem)
        told = json.loads((root / "logs" / stem / "interpret" / "interpret.json").read_text())
        found.append({**told, "preset": "", "lineage": ""})
    assert found[0] == found[1]
    assert {path: path.read_bytes() for path in (root / "checkpoints").iterdir()} == before


def test_the_published_pool_is_labelled_and_its_noise_switched_off(tmp_path: Path) -> None:
    root = trained(tmp_path, model={"routing": {"pool": "sequence", "evaluate": "sample"}})
    torch.manual_seed(1)
    said = look(root, "one")
    torch.manual_seed(2)
    assert look(root, "two").replace("logs/two", "logs/one") == said
    assert (
        "caution  Not causal" in said and 'routing.evaluate is "sample"; here it is "soft"' in said
    )
    told = json.loads((root / "logs" / "one" / "interpret" / "interpret.json").read_text())
    assert told["causal"] is False and told["pool"] == "sequence"


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"type": "simple_lm"}, "a simple_lm"),
        ({"feed_forward": "swiglu"}, "a polychromatic with swiglu"),
    ],
    ids=["simple_lm", "swiglu"],
)
def test_models_that_route_nothing_are_refused(model: dict, told: str, tmp_path: Path) -> None:
    small = (
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "seq_length": 32, **model}
        if "type" in model
        else ROUTED | model
    )
    own = preset()
    own["model"] = small
    write_lists(tmp_path)
    train_here(own, tmp_path)
    with pytest.raises(
        UserError,
        match=f"{told}, which routes nothing: only models of type polychromatic, .* can be "
        "interpreted",
    ):
        look(tmp_path)


def test_without_a_checkpoint_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='run a preset of lineage "t" first'):
        look(tmp_path)
    assert preview_interpret(decoded(), tmp_path)[0].startswith("cannot start yet: ")


def test_the_menu_says_what_it_would_do(root: Path) -> None:
    lines = preview_interpret(decoded(), root)
    assert lines == [
        "looks into t_current.pth, step 2",
        "with held-out documents of stories, numbers",
        "writes logs/look/interpret/index.html",
    ]


def test_text_that_nothing_is_held_out_of_is_an_error(root: Path, tmp_path: Path) -> None:
    (root / "alone").mkdir()
    (root / "alone" / "one.txt").write_text(story(1))
    alone = {"sources": [{"type": "text", "path": "alone"}]}
    with pytest.raises(UserError, match="no source holds a document out"):
        look(root, data=alone)
    said = look(root, "both", data={"sources": [*alone["sources"], SOURCES[1]]})
    assert (
        "note  alone holds no document out, and is left out" in said
        and "nothing to compare" in said
    )


def test_an_interruption_writes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopRequest, "__call__", lambda self: True)
    with pytest.raises(Interrupted):
        look(root, "stopped")
    assert not (root / "logs" / "stopped").exists()


def test_every_document_is_heard_before_any_is_heard_out() -> None:
    documents = [np.arange(n) for n in (5, 9, 1, 4)]

    def cut(tokens: int) -> list[tuple[int, list[int]]]:
        return [(number, row.tolist()) for number, row in rows_of(iter(documents), 4, tokens)]

    first = [(0, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (2, [0]), (3, [0, 1, 2, 3])]
    assert cut(10**9) == [*first, (0, [4]), (1, [4, 5, 6, 7]), (1, [8])]
    assert cut(6) == first[:2] and cut(14) == [*first, (0, [4])]


@pytest.mark.slow
def test_it_runs_through_the_program(make_project: Callable[..., Project]) -> None:
    """With real pictures; a note is all it says beside its table."""
    project = make_project({"look": preset(job="interpret", init_from="t")})
    trained(project.folder, train={"max_steps": 5})
    result = project.run("look")
    assert result.code == 0 and result.err == "", result.text
    assert "page: logs/look/interpret/index.html" in result.out
    assert (project.folder / "logs" / "look" / "interpret" / "index.html").stat().st_size > 100_000
