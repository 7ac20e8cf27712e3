"""Masked tokens from end to end on a tiny NeoBERT: what a run tells, that its numbers are what they
are called, that it resumes to the same bits, and what becomes of its weights elsewhere.

D hidden_size, V vocab_size
"""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.data.corpus import open_corpus
from core.data.packing import Row
from core.data.reader import collate
from core.data.tokenizer import MASK, Tokenizer
from core.errors import UserError
from core.jobs.evaluate import evaluate
from core.jobs.interpret import interpret
from core.models import build_model
from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.registry import Preset
from core.runtime import detect_runtime
from tests.project import Project, merged
from tests.training.masked import PRESET, STEPS, masked_run, of_kind
from tests.training.runs import session

OF_DISTANCES = {
    "token_accuracy",
    "top5_accuracy",
    "nll_h12",
    "nll_h4",
    "pseudo_perplexity_h12",
    "pseudo_perplexity_h4",
}


OF_DECODER = {
    "decoder_accuracy",
    "decoder_top5_accuracy",
    "decoder_cross_entropy",
    "decoder_pseudo_perplexity",
}


OF_PROTOTYPES = {
    "prototype_cosine",
    "prototype_spread",
    "prototype_dimensions",
    "prototype_drift",
    "table_cosine",
}


OF_ALL = {
    "event",
    "step",
    "tokens",
    "time",
    "seconds",
    "losses",
    "sources",
    "causal",
    "objective",
    "eval_tokens",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose lineage "t" is PRESET, trained to its end; nobody may change it."""
    root = tmp_path_factory.mktemp("masked")
    masked_run(root)
    return root


# what a run tells ---------------------------------------------------------------------------------


def test_a_run_says_what_it_learns_and_evaluates_from_the_start(root: Path) -> None:
    (start,) = of_kind(root, "run_start")
    assert (start["objective"], start["causal"]) == ("masked_tokens", False)
    assert start["parameters"] - start["trained_parameters"] == 258 * 33, (
        "the decoder that is kept is not trained"
    )
    evaluations = of_kind(root, "eval")
    assert [event["step"] for event in evaluations] == [0, 4, 8]
    for event in evaluations:
        assert set(event) == OF_ALL | OF_DISTANCES | OF_DECODER | OF_PROTOTYPES
        assert (event["objective"], event["causal"], set(event["losses"])) == (
            "masked_tokens",
            False,
            {"harmonic"},
        )
        assert event["token_accuracy"] <= event["top5_accuracy"]
        assert 100 < event["eval_tokens"] < 250
    first, *_, last = evaluations
    assert first["losses"]["harmonic"] == pytest.approx(first["nll_h12"], rel=1e-6)
    assert last["losses"]["harmonic"] == pytest.approx(last["nll_h4"], rel=1e-6)
    assert first["prototype_drift"] == pytest.approx(0.0, abs=1e-6)
    assert last["prototype_drift"] > 1e-4
    assert last["nll_h4"] < first["nll_h4"] - 0.1


def test_steps_tell_the_exponent_from_exactly_minus_12_to_exactly_minus_4(root: Path) -> None:
    told = [event["scheduled"] for event in of_kind(root, "step")]
    assert all(set(each) == {"harmonic.h_exp"} for each in told) and len(told) == STEPS
    found = [each["harmonic.h_exp"] for each in told]
    assert (found[0], found[-1]) == (-12.0, -4.0)
    assert found == pytest.approx(np.linspace(-12.0, -4.0, STEPS).tolist())


def test_tokens_of_the_sources_are_the_tokens_of_the_run(root: Path) -> None:
    """Tokens read, not targets: both sources have some, and together they are all."""
    steps = of_kind(root, "step")
    for event in steps:
        total = sum(account["tokens"] for account in event["sources"].values())
        assert total == event["tokens"] == event["run_tokens"]
    assert all(account["tokens"] > 100 for account in steps[-1]["sources"].values())
    assert steps[-1]["tokens"] == STEPS * 4 * 32


def test_each_blank_is_filled_and_words_have_neighbours(root: Path) -> None:
    """Five tokens with their cosine for each [MASK]; a prompt without one gets one at its end; a
    word of several tokens is left out, and the run says so."""
    samples, near = of_kind(root, "sample"), of_kind(root, "neighbors")
    assert [event["step"] for event in samples] == [0, 0, 4, 4, 8, 8]
    assert [event["step"] for event in near] == [0, 0, 4, 4, 8, 8]
    assert [event["prompt"] for event in samples[:2]] == [
        f"In year {MASK} the {MASK}iver",
        f"no blank {MASK}",
    ]
    for event, blanks in zip(samples, [2, 1] * 3):
        filled = event["text"].split(" | ")
        assert len(filled) == blanks
        for choices in filled:
            cosines = [float(choice.rsplit(" ", 1)[1]) for choice in choices.rsplit(", ", 4)]
            assert len(cosines) == 5
            assert cosines == sorted(cosines, reverse=True)
            assert abs(cosines[0]) <= 1.0
    prototypes = F.normalize(
        Project(root).checkpoint()["model"]["dist_head.weight"].double(), dim=-1
    )
    tokenizer = tokenizer_of(root)
    for event in near[-2:]:
        assert event["word"] in ("e", "1")
        (index,) = tokenizer.encode_batch([event["word"]])[0].tolist()
        cosine = prototypes @ prototypes[index]
        cosine[index] = -2.0
        assert [found for _, found in event["neighbors"]] == pytest.approx(
            cosine.topk(5).values.tolist(), abs=1e-5
        )
    told = session(root.parent / "told", **{**PRESET, "data": {}})
    told.trainer.loader.close()
    told.log.close()
    assert "generate.neighbors_of: river left out, being more than one token each" in told.notes


# numbers by definition ----------------------------------------------------------------------------


def tokenizer_of(root: Path, lineage: str = "t") -> Tokenizer:
    return Tokenizer.from_state(Project(root).checkpoint(lineage=lineage)["tokenizer"])


def trained_model(root: Path, preset: dict, lineage: str = "t") -> nn.Module:
    saved = Project(root).checkpoint(lineage=lineage)
    model = build_model(
        decode_preset(preset, Preset, "t", "t"), tokenizer_of(root, lineage).vocab_size
    )
    model.load_state_dict(saved["model"])
    return model.eval()


def held_rows(root: Path, preset: dict = PRESET) -> list[Row]:
    decoded = decode_preset(preset, Preset, "t", "t")
    corpus = open_corpus(
        decoded, root, Single(), Project(root).checkpoint()["data"].get("held_out")
    )
    return corpus.validation_rows(
        tokenizer_of(root), decoded.model.seq_length, decoded.train.eval_tokens
    )


@torch.no_grad()
def hidden_of(model: nn.Module, row: Row) -> Tensor:
    return model(collate([row], packed=True)).hidden[0].double()  # (T, D)


def distances_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """(n, V) squared, between points on the sphere."""
    return torch.cdist(
        F.normalize(hidden, dim=-1), F.normalize(model.dist_head.weight.double(), dim=-1)
    ).square()


def nll(distances: Tensor, target: int, h_exp: float) -> float:
    return -float((h_exp * (distances + 1e-8).log()).log_softmax(0)[target])


@torch.no_grad()
def test_evaluation_equals_its_definitions(root: Path) -> None:
    """On the rows that were held out, in float64 from the hidden states, one masked token after
    another."""
    model, found = trained_model(root, PRESET), of_kind(root, "eval")[-1]
    sums: dict[str, list[float]] = {}
    for row in held_rows(root):
        hidden = hidden_of(model, row)
        distances = distances_of(model, hidden)
        logits = F.linear(hidden, model.decoder.weight.double(), model.decoder.bias.double())
        for t in np.flatnonzero(row.labels >= 0):
            target = int(row.labels[t])
            assert row.input_ids[t] == tokenizer_of(root).special_id(MASK)
            numbers = {
                "token_accuracy": float(distances[t].argmin() == target),
                "top5_accuracy": float(target in distances[t].topk(5, largest=False).indices),
                "nll_h12": nll(distances[t], target, -12.0),
                "nll_h4": nll(distances[t], target, -4.0),
                "decoder_accuracy": float(logits[t].argmax() == target),
                "decoder_top5_accuracy": float(target in logits[t].topk(5).indices),
                "decoder_cross_entropy": -float(logits[t].log_softmax(0)[target]),
            }
            for name, value in numbers.items():
                sums.setdefault(name, []).append(value)
    assert found["eval_tokens"] == len(sums["nll_h4"])
    expected = {name: float(np.mean(values)) for name, values in sums.items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found["top5_accuracy"] > found["token_accuracy"]


@torch.no_grad()
def test_pseudo_perplexity_hides_one_token_at_a_time(root: Path) -> None:
    """Every token of the held-out rows once, all the others seen: the exponential of the mean, for
    both exponents and decoder."""
    model, found = trained_model(root, PRESET), of_kind(root, "eval")[-1]
    tokenizer = tokenizer_of(root)
    sums: dict[str, list[float]] = {
        "pseudo_perplexity_h12": [],
        "pseudo_perplexity_h4": [],
        "decoder_pseudo_perplexity": [],
    }
    rows = held_rows(root)
    for row in rows:
        whole = np.where(row.labels >= 0, row.labels, row.input_ids)
        for t in np.flatnonzero((row.source_ids >= 0) & (whole != tokenizer.eos_id)):
            batch = collate([row], packed=True)
            batch.input_ids[0] = torch.from_numpy(whole)
            batch.input_ids[0, t] = tokenizer.special_id(MASK)
            hidden, target = model(batch).hidden[0, t].double(), int(whole[t])
            distances = distances_of(model, hidden[None])[0]
            sums["pseudo_perplexity_h12"].append(nll(distances, target, -12.0))
            sums["pseudo_perplexity_h4"].append(nll(distances, target, -4.0))
            logits = F.linear(hidden, model.decoder.weight.double(), model.decoder.bias.double())
            sums["decoder_pseudo_perplexity"].append(-float(logits.log_softmax(0)[target]))
    assert len(sums["pseudo_perplexity_h4"]) > 400
    assert {int(source) for row in rows for source in row.source_ids} >= {0, 1}
    expected = {name: math.exp(np.mean(values)) for name, values in sums.items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


# the weights elsewhere ----------------------------------------------------------------------------


DECODER = {
    "model": {"head": "decoder", "keep_decoder": False},
    "losses": [{"type": "cross_entropy"}],
}


@pytest.fixture(scope="module")
def decoder_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("decoder")
    masked_run(root, "first", **DECODER)
    return root


def test_the_decoder_trains_by_cross_entropy_and_is_called_no_language_model(
    decoder_root: Path,
) -> None:
    """Masked cross-entropy and pseudo-perplexity, and neither perplexity nor bits per byte, which
    are of whole texts."""
    evaluations = of_kind(decoder_root, "eval", "first")
    of_logits = {
        "cross_entropy",
        "pseudo_perplexity",
        "token_accuracy",
        "top5_accuracy",
        "entropy",
        "max_probability",
    }
    for event in evaluations:
        assert set(event) == OF_ALL | of_logits | {"embedding_cosine", "table_cosine"}
    assert evaluations[-1]["cross_entropy"] < evaluations[0]["cross_entropy"] - 0.1
    assert evaluations[-1]["cross_entropy"] == pytest.approx(
        evaluations[-1]["losses"]["cross_entropy"], rel=1e-6
    )
    assert of_kind(decoder_root, "step", "first")[0]["scheduled"] == {}
    assert " %" in of_kind(decoder_root, "sample", "first")[-1]["text"]


@pytest.mark.slow
def test_a_kept_decoder_measures_what_it_did_in_the_run_it_comes_from(decoder_root: Path) -> None:
    """A distance head begins from those weights: at step 0 the decoder's numbers are the first
    lineage's last, on the same text; prototypes are its embeddings; and though the encoder moves
    on, the decoder does not."""
    events = masked_run(decoder_root, "second", init_from="first")
    before = of_kind(decoder_root, "eval", "first")[-1]
    first, *_, last = [event for event in events if event["event"] == "eval"]
    renamed = {
        "decoder_cross_entropy": "cross_entropy",
        "decoder_accuracy": "token_accuracy",
        "decoder_top5_accuracy": "top5_accuracy",
        "decoder_pseudo_perplexity": "pseudo_perplexity",
        "eval_tokens": "eval_tokens",
    }
    assert {name: first[name] for name in renamed} == pytest.approx(
        {n: before[old] for n, old in renamed.items()}, rel=1e-6
    )
    assert first["prototype_drift"] == pytest.approx(0.0, abs=1e-6)
    assert last["decoder_cross_entropy"] != pytest.approx(before["cross_entropy"], rel=1e-4)
    old, new = (
        Project(decoder_root).checkpoint(lineage=lineage)["model"]
        for lineage in ("first", "second")
    )
    assert all(torch.equal(old[name], new[name]) for name in ("decoder.weight", "decoder.bias"))
    assert not torch.equal(old["model.encoder.weight"], new["model.encoder.weight"])


@pytest.mark.parametrize(
    ("job", "run", "told"),
    [
        (
            "evaluate",
            evaluate,
            "holds a neobert, which fills in masked tokens and continues no text",
        ),
        ("interpret", interpret, "holds a neobert, which routes nothing"),
    ],
)
@pytest.mark.parametrize("head", ["distance", "decoder"])
def test_jobs_that_ask_for_next_tokens_refuse_it(
    head: str, job: str, run: Callable[..., None], told: str, root: Path, decoder_root: Path
) -> None:
    folder, origin, own = (
        (root, "t", {}) if head == "distance" else (decoder_root, "first", DECODER)
    )
    preset = decode_preset(
        merged(PRESET, {**own, "job": job, "init_from": origin}), Preset, "asks", "asks"
    )
    with pytest.raises(UserError, match=told) as refused:
        run(preset, detect_runtime(), Single(), folder, 0.0, io.StringIO())
    assert refused.value.exit_code == 2
