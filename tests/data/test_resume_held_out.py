"""Held-out documents stay out of training, over resumes and changes of the data."""

import gzip
import json
import random
from pathlib import Path

import pytest

from core.data.pipeline_factory import PipelineFactory
from core.data.sources import build_source
from core.data.sources.chat import ChatSettings
from core.data.sources.text import TextSettings
from core.data.sources.tokens import TokensSettings
from core.data.validation import plan_hold_out, validation_rows
from tests.data.corpus import (
    LANES,
    NEXT_TOKEN,
    SEQ_LENGTH,
    Stretch,
    byte_tokenizer,
    check_accounts,
    history,
    make_factory,
    write_corpus,
)
from tests.data.resume_setup import PACKINGS, STRATEGIES, mix_of, random_plan, write_tokens

# held-out documents -------------------------------------------------------------------------------

TWICE = "the same text in three places, of which one is held out"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large sources, held out by hash, and small ones that hold out their last documents; some
    texts are in several."""
    root = tmp_path_factory.mktemp("many")
    write_corpus(root, {"large": 420, "small": 40}, low=5, high=30)
    large = [json.loads(line)["text"] for line in (root / "large.jsonl").read_text().splitlines()]
    small = [json.loads(line)["text"] for line in (root / "small.jsonl").read_text().splitlines()]
    with gzip.open(root / "mixed.jsonl.gz", "wt") as file:
        for line in [
            TWICE,
            *large[100:160],
            small[-1],
            *small[:5],
            *(f"mixed {i}" for i in range(60)),
            TWICE,
        ]:
            file.write(json.dumps({"text": line}) + "\n")
    for name, count in (("chat", 350), ("few", 30)):
        with gzip.open(root / f"{name}.jsonl.gz", "wt") as file:
            for i in range(count):
                file.write(
                    json.dumps({"messages": [{"role": "assistant", "content": f"{name} {i} says"}]})
                    + "\n"
                )
    write_tokens(root / "tokens", [f"tokens {i}" for i in range(350)], 1000)
    write_tokens(root / "little", [f"little {i}" for i in range(25)], 100)
    return root


HELD = {
    "texts": [
        TextSettings(path="large.jsonl", name="large"),
        TextSettings(path="small.jsonl", name="small"),
        TextSettings(path="mixed.jsonl.gz", name="mixed"),
    ],
    "chat": [
        ChatSettings(path="chat.jsonl.gz", name="chat"),
        ChatSettings(path="few.jsonl.gz", name="few"),
    ],
    "tokens": [
        TokensSettings(path="tokens", name="tokens"),
        TokensSettings(path="little", name="little"),
    ],
}


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
@pytest.mark.parametrize("kinds", HELD)
def test_validation_documents_never_occur_in_training(
    kinds: str, seed: int, many: Path, small: None
) -> None:
    """Over the log of what was consumed, for any ranks and resumes; and nothing else is kept from
    training."""
    draw = random.Random(f"{kinds} {seed}")
    sections, packing, strategy = HELD[kinds], draw.choice(PACKINGS), STRATEGIES[seed]
    cached, fraction, plans = 0.01 * draw.choice([0, 1]), 0.08, []

    def make(number: int) -> PipelineFactory:
        sources = [build_source(section, many, 1) for section in sections]
        plans.append(
            plan_hold_out(sources, fraction, 1, plans[-1].state() if plans and number else None)
        )
        mix = mix_of(strategy, len(sections), max_epochs=2)
        how = {"packing": packing, "mix": mix, "shuffle": "documents", "cache_gigabytes": cached}
        return make_factory(many, sections, hold_out=plans[-1], **how)

    found = history(make, [*random_plan(draw, 30 * LANES, 3), Stretch(None, 2)])
    check_accounts(found, make(0))
    assert all(plan.state() == plans[0].state() for plan in plans)
    factory = make(0)
    documents = [
        (source.name, document) for source in factory.sources for document in source.stream({})
    ]
    held = {document.digest for _, document in documents if plans[0].holds(document)}
    rows = validation_rows(
        factory.sources, plans[0], byte_tokenizer(), NEXT_TOKEN, SEQ_LENGTH, 10**9, 1
    )
    read = {segment.digest for row in rows for segment in row.segments}
    assert read == held and not held & found.digests, (
        f"{len(held & found.digests)} of {len(held)} were trained on"
    )
    assert held | found.digests == {document.digest for _, document in documents}
    assert all(
        any(d.digest in held for name, d in documents if name == section.name)
        for section in sections
    )
    for section in sections:
        texts = {document.digest for name, document in documents if name == section.name}
        assert len(texts & held) == round(fraction * len(texts)) > 0
