"""BLiMP, the benchmark of linguistic minimal pairs (Warstadt et al. 2020, arXiv 1912.00582): of two
sentences that differ little, a model should find the grammatical one more likely.

In:    67 paradigms of pairs: of the Hub, or of a folder or a zip on this machine; a Scorer
Out:   the share of pairs that are right, of each paradigm, of 12 fields and in all
State: the Hub library's local cache

A pair is right where the good sentence's log-probability, the sum over all its tokens after the
end-of-document token, is strictly greater: a tie is wrong. Accuracies are means over paradigms, all
of which count alike, and their errors say how far paradigms lie apart."""

import json
import math
import statistics
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from core.data.tokenizer import Tokenizer
from core.errors import MissingPackage, SourceUnavailable, UserError
from core.evaluation.blimp_paradigms import PARADIGMS
from core.evaluation.harness.scoring import ReportProgress, Scorer
from core.evaluation.results import MetricValue, TaskScore
from core.files import own_path
from core.hf_hub import fetch_file
from core.optional_packages import need

NAME = "blimp"
REPOSITORY = "nyu-mll/blimp"
HUB_FILE = "{}/train-00000-of-00001.parquet"
GOOD, BAD = "sentence_good", "sentence_bad"
FIELD_OF = {paradigm: field for field, names in PARADIGMS.items() for paradigm in names}
ANCHORS = (
    "BLiMP's anchors: GPT-2 of 98M parameters after BabyLM's strict-small budget (10M words, 10 "
    "epochs) 64.4 %, GPT-BERT on that budget 71.7 %; chance is 50 %"
)
NEAREST_NORMAL = 1.959964
"""Standard errors of a 95 % interval."""

Pair = tuple[str, str]
"""The good sentence and the bad one."""
Pairs = Mapping[str, list[Pair]]
"""Those of each paradigm."""


def load_pairs(path: str | None, root: Path, limit: int | None = None) -> Pairs:
    """Read the pairs of every paradigm, at most `limit` of each.

    path   a folder or a zip of JSON lines, a file for each paradigm; None: the Hub

    Raises UserError, or SourceUnavailable where the Hub does not give them."""
    if path is None:
        return {name: _of_hub(name)[:limit] for name in FIELD_OF}
    place = own_path(path, root)
    found: dict[str, list[Pair]] = {}
    try:
        for name, content in _files(place):
            if name in FIELD_OF:
                found[name] = _pairs(content, place, name)[:limit]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"blimp_path: {place} cannot be read: {error}. {_advice()}") from None
    if missing := [name for name in FIELD_OF if not found.get(name)]:
        shown = f"{', '.join(missing[:3])}{' ...' * (len(missing) > 3)}"
        raise UserError(
            f"blimp_path: {place} lacks {len(missing)} of BLiMP's {len(FIELD_OF)} paradigms "
            f"({shown}). {_advice()}"
        )
    return {name: found[name] for name in FIELD_OF}


def _advice() -> str:
    return (
        "Name a folder or a zip that holds <paradigm>.jsonl for each, or leave blimp_path out to "
        f"read {REPOSITORY} of the Hub."
    )


def _files(place: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the JSON lines in a folder or a zip, wherever in it they are."""
    if place.is_dir():
        for path in sorted(place.rglob("*.jsonl")):
            yield path.stem, path.read_bytes()
        return
    with zipfile.ZipFile(place) as archive:
        for member in sorted(archive.namelist()):
            name = member.rsplit("/", 1)[-1]
            if name.endswith(".jsonl"):
                yield name.removesuffix(".jsonl"), archive.read(member)


def _pairs(content: bytes, place: Path, name: str) -> list[Pair]:
    pairs = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
            good, bad = row[GOOD], row[BAD]
            assert isinstance(good, str) and isinstance(bad, str)
        except (ValueError, KeyError, TypeError, AssertionError):
            raise UserError(
                f"blimp_path: line {number} of {name}.jsonl in {place} is no pair: each line is "
                f'a JSON object with the texts "{GOOD}" and "{BAD}".'
            ) from None
        pairs.append((good, bad))
    return pairs


def _of_hub(name: str) -> list[Pair]:
    """Fetch a paradigm from the Hub. Raises SourceUnavailable."""
    parquet = need("pyarrow.parquet", "pyarrow", MissingPackage)
    path = fetch_file(REPOSITORY, HUB_FILE.format(name), "datasets/")
    columns = parquet.read_table(path, columns=[GOOD, BAD]).to_pydict()
    if not columns[GOOD]:
        raise SourceUnavailable(f"{REPOSITORY} has no pair in {name}")
    return list(zip(columns[GOOD], columns[BAD]))


def score_pairs(
    pairs: Pairs,
    scorer: Scorer,
    tokenizer: Tokenizer,
    progress: ReportProgress = lambda done, total: None,
) -> dict[str, float]:
    """Return the share of right pairs of each paradigm. Sentences of all paradigms are batched
    together, by length."""
    flat = [sentence for each in pairs.values() for pair in each for sentence in pair]
    rows = [([tokenizer.eos_id], ids.tolist()) for ids in tokenizer.encode_batch(flat)]
    scores = iter(score for score, _ in scorer.loglikelihoods(rows, progress))
    return {
        name: statistics.fmean(next(scores) > next(scores) for _ in each)
        for name, each in pairs.items()
    }


def mean_accuracy(accuracies: Mapping[str, float]) -> float:
    """Return the mean over paradigms."""
    return statistics.fmean(accuracies.values())


def blimp_scores(accuracies: Mapping[str, float], pairs: Pairs) -> dict[str, TaskScore]:
    """Return the rows of a report: all of it, then the fields, then each field's paradigms."""
    found = {NAME: _score(accuracies, pairs, FIELD_OF, None)}
    found |= {
        f"{NAME}: {field}": _score(accuracies, pairs, names, NAME)
        for field, names in PARADIGMS.items()
    }
    return found | {
        name: _score(accuracies, pairs, [name], f"{NAME}: {field}")
        for name, field in FIELD_OF.items()
    }


def _score(
    accuracies: Mapping[str, float], pairs: Pairs, names: Iterable[str], part_of: str | None
) -> TaskScore:
    """Make the score of some paradigms; of several, with the error of their mean."""
    values, count = [accuracies[name] for name in names], sum(len(pairs[name]) for name in names)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    metric = MetricValue("acc", None, statistics.fmean(values), error, higher_is_better=True)
    return TaskScore([metric], count, num_fewshot=0, version=None, part_of=part_of)


def blimp_notes(scores: Mapping[str, TaskScore]) -> list[str]:
    """Return what stands beside the numbers: the interval over paradigms, and the anchors."""
    metric: Any = scores[NAME].metrics[0]
    half = NEAREST_NORMAL * metric.stderr
    low, high = 100 * (metric.value - half), 100 * (metric.value + half)
    return [
        f"{100 * metric.value:.1f} %, and {low:.1f} to {high:.1f} % with 95 % over paradigms; ± is "
        "of the mean over paradigms, and a tie is wrong",
        ANCHORS,
    ]
