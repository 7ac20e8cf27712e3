"""Samples to look at after an evaluation: texts that the model generates, masks that it fills,
words that are close to others.

In:    a tokenizer, the preset's prompts and words
Out:   events
State: none
"""

from collections.abc import Callable, Iterator
from typing import Any

from core.contracts import LanguageModel
from core.data.tokenizer import Tokenizer
from core.generation.engine import TextGenerator, generate_text
from core.generation.fill_mask import fill_masks, neighbors, word_ids
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
) -> tuple[Callable[[LanguageModel, int], Iterator[Event]], list[str]]:
    """Return (the events of a model at a step, notes). The same model, step and seed give the same
    texts.

    context   tokens that a model sees at once
    masked    whether prompts have masks that the model fills
    between   called between tokens, and between samples; may raise, to stop
    """
    words, unknown = word_ids(tokenizer, settings.neighbors_of)
    notes = []
    if unknown:
        left_out = ", ".join(unknown)
        notes.append(f"generate.neighbors_of: {left_out} left out, being more than one token each")

    def samples(model: LanguageModel, step: int) -> Iterator[Event]:
        model.eval()
        generator = TextGenerator(model, tokenizer, context)
        for i, prompt in enumerate(settings.prompts):
            if masked:
                prompt, text = fill_masks(model, tokenizer, prompt, context)
            else:
                prompt_seed = derive_seed(seed, "sample", step, i)
                text = generate_text(generator, prompt, settings, prompt_seed, between)
            yield "sample", {"prompt": prompt, "text": text}
            between()
        for event in neighbors(model, tokenizer, words):
            yield "neighbors", event

    return samples, notes
