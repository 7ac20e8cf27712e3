"""The proof that an export says what the trained model says: its files are loaded in a fresh
process, and compared.

In:    a Trained; the folder that was written; text
Out:   Proof; UserError where anything differs
State: none

    our model  -> logits of text, greedy tokens --+
                                                  +-> equal?
    the folder -> the same, by transformers ------+
                  in a process without this program (proof_process.py)
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from core.contracts import plain_batch
from core.data.tokenizer import Tokenizer
from core.errors import UserError
from core.generation.engine import GenerationRow, TextGenerator, advance
from core.generation.sampling import SamplingParams
from core.models.readout import full_scores
from core.trained import Trained

TOLERANCE = 1e-4
"""Largest difference of two logits that rounding in fp32 may make."""
NEW_TOKENS = 32
LONGEST_ROW = 128
SCRIPT = Path(__file__).with_name("proof_process.py")


@dataclass(frozen=True)
class Proof:
    """The measurements of a proof.

    max_difference   of two logits; None where weights alone were exported
    tokens           that were compared
    text             where they come from, in words
    said             tokens of greedy text that are the same
    gguf             {file: one sentence}
    """

    max_difference: float | None
    tokens: int
    text: str
    said: int
    gguf: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ProofText:
    """The rows of tokens that are compared, and where they come from, in words."""

    rows: list[list[int]]
    origin: str


def proof_text(
    tokenizer: Tokenizer, documents: Iterator[Any], prompts: list[str], context: int, tokens: int
) -> ProofText:
    """Take rows of held-out documents; prompts where there are none."""
    longest, rows, left = min(context, LONGEST_ROW), list[list[int]](), tokens
    for document in documents:
        for begin in range(0, min(len(document), left), longest):
            rows.append(document[begin : begin + min(longest, left)].tolist())
            left -= len(rows[-1])
        if left <= 0:
            break
    if rows:
        return ProofText(rows, "held-out text")
    texts = tokenizer.encode_batch([text for text in prompts if text] or ["Once upon a time"])
    rows = [[tokenizer.eos_id, *ids.tolist()][:longest] for ids in texts]
    return ProofText(rows, "the preset's prompts, as no held-out text is here")


def alternating(sources: dict[str, Iterator[Any]]) -> Iterator[Any]:
    """Yield a document of each source in turn."""
    for several in zip_longest(*sources.values()):
        yield from (document for document in several if document is not None)


def prove(
    trained: Trained[Any], folder: Path, text: ProofText, gguf: list[str], logits: bool = True
) -> Proof:
    """Compare what a folder computes with the trained model. Raises UserError where it is
    another.

    gguf     names of GGUF files in the folder
    logits   false for weights alone: only the tokenizer is compared
    """
    tokenizer, rows = trained.tokenizer, text.rows
    prompt = rows[0][: max(1, min(8, len(rows[0]) - 1))]
    texts = [tokenizer.decode([i for i in row if i != tokenizer.eos_id]) for row in rows]
    request = {
        "folder": str(folder),
        "texts": texts,
        "rows": rows,
        "prompt": prompt,
        "new_tokens": min(NEW_TOKENS, trained.preset.model.seq_length - len(prompt)),
        "end": tokenizer.eos_id,
        "logits": logits,
        "gguf": gguf,
    }
    found = _in_fresh_process(request, _logits(trained, rows) if logits else {})
    expected = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    _check_ids(found["ids"], expected, texts, "AutoTokenizer")
    tokens = sum(map(len, rows))
    if not logits:
        return Proof(None, tokens, text.origin, 0)
    ours = _greedy(trained, prompt, request["new_tokens"])
    _check(found, ours, "transformers")
    sentences = {
        name: _check_gguf(name, each, ours, expected, texts) for name, each in found["gguf"].items()
    }
    return Proof(found["max_difference"], tokens, text.origin, len(ours), sentences)


def _in_fresh_process(request: dict[str, Any], logits: dict[str, Tensor]) -> dict[str, Any]:
    with TemporaryDirectory() as scratch:
        asked = Path(scratch) / "request.json"
        asked.write_text(json.dumps(request))
        save_file(logits or {"none": torch.zeros(1)}, asked.with_suffix(".logits"))
        done = subprocess.run(
            [sys.executable, "-P", str(SCRIPT), str(asked)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise UserError(
            f"the export could not be loaded by the transformers library, and is not kept: {reason}"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def _logits(trained: Trained[Any], rows: list[list[int]]) -> dict[str, Tensor]:
    """The logits (T, V) after each token of each row, by the row's number."""
    device, logits = next(trained.model.parameters()).device, {}
    for number, row in enumerate(rows):
        output = trained.model(plain_batch(torch.tensor([row], device=device)))
        logits[str(number)] = full_scores(output.readout, output.hidden[0]).cpu().contiguous()
    return logits


def _greedy(trained: Trained[Any], prompt: list[int], tokens: int) -> list[int]:
    """Return the likeliest tokens after a prompt, up to the end of the document."""
    generator = TextGenerator(trained.model, trained.tokenizer, trained.preset.model.seq_length)
    row = GenerationRow(trained.tokenizer, prompt, SamplingParams(max_tokens=tokens), seed=0)
    for _ in advance(generator, [row]):
        pass
    return row.ids[len(prompt) :]


def _check(found: dict[str, Any], ours: list[int], reader: str) -> None:
    if not found["max_difference"] <= TOLERANCE:
        raise UserError(
            f"the export is not kept: read by {reader}, its logits differ from the trained "
            f"model's by up to {found['max_difference']:.2g}, and {TOLERANCE:g} is what rounding "
            'explains. Please report it; "export": {"as": "weights"} does without an architecture.'
        )
    if found["said"] != ours:
        same = next(
            i for i, pair in enumerate(zip_longest(found["said"], ours)) if len({*pair}) > 1
        )
        raise UserError(
            f"the export is not kept: read by {reader}, its greedy text is another from token "
            f"{same + 1} on. Two tokens may be equally likely: train on, or export another "
            "checkpoint; if it stays so, please report it."
        )


def _check_ids(
    found: list[list[int]], expected: list[list[int]], texts: list[str], reader: str
) -> None:
    for theirs, ours, text in zip(found, expected, texts):
        if theirs != ours:
            at = next(i for i, pair in enumerate(zip_longest(theirs, ours)) if len({*pair}) > 1)
            raise UserError(
                f"the export is not kept: {reader} makes other tokens of {text[:60]!r}, from "
                f"token {at + 1} on. The tokenizer cannot be written in its format."
            )


def _check_gguf(
    name: str,
    found: dict[str, Any],
    ours: list[int],
    expected: list[list[int]],
    texts: list[str],
) -> str:
    """Return what a GGUF file was found to say. Raises UserError; what is rounded may differ."""
    exact, spoken = name.endswith("-f32.gguf"), found.get("llama_cpp")
    if exact:
        _check(found, ours, "transformers from GGUF")
    sentence = f"logits within {found['max_difference']:.2g}, {_agreement(found['said'], ours)}"
    if spoken is None:
        return f"{sentence} (transformers' reader; llama-cpp-python is not installed)"
    _check_ids(spoken["ids"], expected, texts, "llama.cpp")
    if exact and spoken["said"] != ours:
        raise UserError(
            f"the export is not kept: llama.cpp reads {name}, and its greedy text is another: "
            f"{_agreement(spoken['said'], ours)}. Please report it."
        )
    return f"{sentence} (transformers' reader); llama.cpp: {_agreement(spoken['said'], ours)}"


def _agreement(theirs: list[int], ours: list[int]) -> str:
    pairs = enumerate(zip(theirs, ours))
    same = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
    return f"{same} of {len(ours)} greedy tokens the same"
