"""Loss, perplexity and bits per byte on the documents of each source that training never sees.

In:    a trained model, its tokenizer, a corpus split as its training split it
Out:   numbers for each source, those of training's own evaluations
State: none
"""

from typing import Any

from core.data.corpus import Corpus
from core.data.packing import Row
from core.data.tokenizer import Tokenizer
from core.evaluation.harness.scoring import Told
from core.evaluation.held_out import Evaluator, HeldOut
from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
from core.losses.stack import LossStack
from core.training.machine import Machine

KEPT = ("cross_entropy", "perplexity", "bits_per_byte", "token_accuracy")


def held_out_rows(
    corpus: Corpus, tokenizer: Tokenizer, seq_length: int, tokens: int
) -> dict[str, list[Row]]:
    """Held-out rows of each source, up to `tokens` tokens of each."""
    return {
        name: corpus.validation_rows(tokenizer, seq_length, tokens, only=name)
        for name in corpus.names
    }


def perplexity(
    model: Any,
    rows: list[Row],
    batch_rows: int,
    machine: Machine,
    told: Told,
) -> dict[str, Any] | None:
    """Cross-entropy in nats per token, its exponential, bits per byte, accuracy, and of how many
    tokens; None without any."""
    stack = LossStack([CrossEntropy(CrossEntropySettings(type="cross_entropy"))])
    evaluator = Evaluator(machine, HeldOut(lambda: rows), stack, batch_rows)
    found = evaluator.run(model, 1.0, told)
    return (
        None
        if found is None
        else {**{key: found[key] for key in KEPT}, "tokens": found["eval_tokens"]}
    )
