"""Loss, perplexity and bits per byte on the documents of each source that training never sees.

In:    a trained model's preset, its tokenizer, what its training held out
Out:   numbers for each source, those of training's own evaluations
State: none
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core.data.corpus import Corpus, open_corpus
from core.data.packing import Row
from core.data.tokenizer import Tokenizer
from core.evaluation import Evaluator
from core.harness.scoring import Told
from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
from core.losses.stack import LossStack

KEPT = ("cross_entropy", "perplexity", "bits_per_byte", "token_accuracy")


def open_held_out(preset: Any, root: Path, alone: Any, made_with: dict | None, held_out: dict | None) -> tuple[Corpus, list[str]]:
    """The preset's data, split as it was for training; remarks. Raises NoData.

    alone       the ranks: one process
    made_with   the preset of the training, as JSON: where it held out less than this one, so does this
    held_out    of the training's checkpoint
    """
    notes = []
    data = preset.data
    trained = (made_with or {}).get("data", {}).get("validation_fraction", data.validation_fraction)
    if trained < data.validation_fraction:
        notes.append(
            f"validation_fraction is {trained:g}, as in training: the rest of {data.validation_fraction:g} was trained on"
        )
        data = data.model_copy(update={"validation_fraction": trained})
    corpus = open_corpus(preset.model_copy(update={"data": data}), root, alone, held_out)
    return corpus, notes + [f"source {name} left out: {reason}" for name, reason in corpus.failed.items()]


def held_out_rows(corpus: Corpus, tokenizer: Tokenizer, seq_length: int, tokens: int) -> dict[str, list[Row]]:
    """Held-out rows of each source, up to `tokens` tokens of each."""
    rows = corpus.validation_rows(tokenizer, seq_length, tokens * len(corpus.sources))
    found: dict[str, list[Row]] = {name: [] for name in corpus.names}
    for row in rows:
        found[corpus.names[int(row.source_ids.max())]].append(row)
    return found


def perplexity(
    model: Any,
    tokenizer: Tokenizer,
    rows: list[Row],
    batch_rows: int,
    alone: Any,
    device: torch.device,
    dtype: torch.dtype,
    told: Told,
) -> dict[str, Any] | None:
    """Cross-entropy in nats per token, its exponential, bits per byte, accuracy, and of how many tokens; None without any."""
    stack = LossStack([CrossEntropy(CrossEntropySettings(type="cross_entropy"))])
    make: Callable[[], list[Row]] = lambda: rows  # noqa: E731
    found = Evaluator(make, stack, tokenizer.token_bytes(), batch_rows, alone, device, dtype).run(model, 1.0, told)
    return None if found is None else {**{key: found[key] for key in KEPT}, "tokens": found["eval_tokens"]}
