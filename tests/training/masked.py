"""A small run that predicts masked tokens, for the tests."""

from pathlib import Path
from typing import Any

from core.data.tokenizer import MASK
from tests.project import Project, merged, story, tiny_preset, train_here

STEPS = 8
MODEL = {"type": "neobert", "head": "distance", "keep_decoder": True, "intermediate_size": 64}
PRESET = tiny_preset(
    model=MODEL,
    losses=[{"type": "harmonic"}],
    train={
        "max_steps": STEPS,
        "eval_tokens": 300,
        "eval_every_tokens": 500,
        "eval_at_start": True,
        "precision": "fp32",
    },
    data={
        "sources": [{"type": "text", "path": "short"}, {"type": "text", "path": "shorter"}],
        "mix_strategy": "weighted",
        "source_weights": [0.7, 0.3],
        "mask_fraction": 0.3,
    },
    generate={
        "prompts": [f"In year {MASK} the {MASK}iver", "no blank"],
        "neighbors_of": ["e", "river", "1"],
    },
)


def write_texts(root: Path) -> None:
    """Two sources that hold so little out that each of its tokens is hidden in its turn."""
    for name, sentences in (("short", 5), ("shorter", 3)):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(100, 130):
            (root / name / f"{number + 30 * sentences}.txt").write_text(
                story(number + 30 * sentences, sentences)
            )


def masked_run(root: Path, stem: str = "t", **changes: Any) -> list[dict]:
    """All events of a run of PRESET with these changes."""
    write_texts(root)
    return train_here(merged(PRESET, changes), root, stem)


def of_kind(root: Path, kind: str, lineage: str = "t") -> list[dict]:
    return Project(root).events(kind, lineage)
