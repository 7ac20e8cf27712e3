"""What people look at after an evaluation: texts that the model writes, blanks that it fills, words
that lie near others.

In:    a tokenizer, the preset's prompts and words
Out:   events
State: none
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from core.data.tokenizer import Tokenizer
from core.generation.engine import Voice, generate
from core.generation.fill_mask import fill, neighbors, word_ids
from core.preset.settings import GenerateSettings
from core.randomness import derive_seed

Event = tuple[str, dict[str, Any]]


def build_samples(
    tokenizer: Tokenizer,
    settings: GenerateSettings,
    context: int,
    masked: bool,
    seed: int,
    between: Callable[[], None] = lambda: None,
) -> tuple[Callable[[nn.Module, int], Iterator[Event]], list[str]]:
    """(the events of a model at a step, remarks). The same model, step and seed give the same
    texts.

    context   tokens that a model sees at once
    masked    whether prompts have blanks that the model fills
    between   called between tokens, and between blanks; may raise, to stop
    """
    words, unknown = word_ids(tokenizer, settings.neighbors_of)
    notes = (
        [f"generate.neighbors_of: {', '.join(unknown)} left out, being more than one token each"]
        if unknown
        else []
    )

    def samples(model: nn.Module, step: int) -> Iterator[Event]:
        model.eval()
        voice = Voice(model, tokenizer, context)
        for i, prompt in enumerate(settings.prompts):
            if masked:
                prompt, text = fill(model, tokenizer, prompt, voice.context)
            else:
                text = generate(
                    voice, prompt, settings, derive_seed(seed, "sample", step, i), between
                )
            yield "sample", {"prompt": prompt, "text": text}
            between()
        for each in neighbors(model, tokenizer, words):
            yield "neighbors", each

    return samples, notes
