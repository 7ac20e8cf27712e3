"""Loss, perplexity and bits per byte on the documents of each source that training never sees.

In:    a trained model, its tokenizer, a corpus split as its training split it
Out:   numbers for each source, those of training's own evaluations
State: none
"""

from dataclasses import dataclass

from core.contracts import LanguageModel
from core.data.corpus import Corpus
from core.data.packing import Row
from core.data.tokenizer import Tokenizer
from core.evaluation.harness.scoring import ReportProgress
from core.evaluation.held_out import Evaluator, HeldOut
from core.losses.cross_entropy import CrossEntropy, CrossEntropySettings
from core.losses.stack import LossStack
from core.training.machine import Machine


@dataclass(frozen=True)
class HeldOutScore:
    """Cross-entropy in nats per token, its exponential, bits per byte, accuracy, and of how many
    tokens."""

    cross_entropy: float
    perplexity: float
    bits_per_byte: float | None
    token_accuracy: float
    tokens: int


def held_out_rows(
    corpus: Corpus, tokenizer: Tokenizer, seq_length: int, tokens: int
) -> dict[str, list[Row]]:
    """Return held-out rows of each source, up to `tokens` tokens of each."""
    return {
        name: corpus.validation_rows(tokenizer, seq_length, tokens, only=name)
        for name in corpus.names
    }


def measure_perplexity(
    model: LanguageModel,
    rows: list[Row],
    batch_rows: int,
    machine: Machine,
    progress: ReportProgress,
) -> HeldOutScore | None:
    """Measure the model on held-out rows; None without any."""
    stack = LossStack([CrossEntropy(CrossEntropySettings(type="cross_entropy"))])
    evaluator = Evaluator(machine, HeldOut(lambda: rows), stack, batch_rows)
    numbers = evaluator.run(model, 1.0, progress)
    if numbers is None:
        return None
    return HeldOutScore(
        cross_entropy=numbers["cross_entropy"],
        perplexity=numbers["perplexity"],
        bits_per_byte=numbers["bits_per_byte"],
        token_accuracy=numbers["token_accuracy"],
        tokens=numbers["eval_tokens"],
    )
