"""A trained model for five lines of Python, in a notebook or in a program of your own.

In:    a lineage, or a checkpoint file of this program
Out:   LoadedModel: text, streams, log-probabilities, and the model as the transformers library
       knows it
State: none; checkpoints are only read

    core.load  -->  core/trained.py, as the jobs do  -->  core/generation, core/evaluation,
                                                          core/export
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.checkpoint.weights import Weights, find_weights, is_file
from core.environment import read_dotenv
from core.errors import UserError
from core.evaluation.harness.scoring import Scorer
from core.export.architectures import as_transformers
from core.export.tokenizer_files import transformers_tokenizer
from core.files import own_path
from core.generation.engine import GenerationRow, TextGenerator, row_of_prompt, stream_text
from core.generation.sampling import SamplingParams
from core.preset.base import PresetBase
from core.preset.decode import decode_preset
from core.preset.merge import merge, preset_json
from core.preset.settings import NEXT_TOKEN, GenerateSettings, objective_of
from core.randomness import derive_seed
from core.registry import Preset
from core.runtime import detect_runtime
from core.trained import Trained, build_generator, trained_of

HOME = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of each token of a text after those before it, in nats; the first one's
    is at the beginning of a document."""

    ids: list[int]
    tokens: list[str]
    """What each token alone is as text."""
    logprobs: list[float]

    @property
    def total(self) -> float:
        """The log-probability of the whole text."""
        return sum(self.logprobs)


class LoadedModel:
    """A trained model, on the GPU where there is one."""

    def __init__(self, trained: Trained[PresetBase]):
        self.trained = trained
        """The network, its tokenizer, the preset it was trained with, and notes on all of that."""
        self._generator: TextGenerator | None = None

    def __repr__(self) -> str:
        settings = self.trained.preset.model
        return f"<{settings.type} of {self.trained.where}, sees {settings.seq_length:,} tokens>"

    def generate(self, prompt: str, *, seed: int | None = None, **sampling: Any) -> str:
        """Return the text after a prompt, which begins a document. The same seed gives the same
        text. Raises UserError.

        sampling   max_tokens, temperature, top_p, no_repeat_ngram, stop; those left out are as in
                   the `generate` section of the preset that the model was trained with
        """
        return "".join(self.stream(prompt, seed=seed, **sampling))

    def stream(self, prompt: str, *, seed: int | None = None, **sampling: Any) -> Iterator[str]:
        """Return what `generate` does, in pieces, as soon as they are final."""
        generator = self._text_generator()
        settings = self._settings(sampling)
        seed = derive_seed(self.trained.preset.train.seed if seed is None else seed, "generate", 0)
        params = SamplingParams.from_settings(settings)
        row: GenerationRow = row_of_prompt(generator.tokenizer, prompt, params, seed)
        return stream_text(generator, row)

    def logprobs(self, text: str) -> TokenLogprobs:
        """Measure how likely the model finds each token of a text. One that is longer than the
        model's context is read in windows, each after the last token of the one before. Raises
        UserError."""
        self._check_causal("gives no probabilities of a text")
        tokenizer = self.trained.tokenizer
        ids = tokenizer.encode_batch([text])[0].tolist()
        scorer = Scorer(self.trained.model, self.trained.preset.model.seq_length, batch_size=1)
        logprobs = scorer.token_logprobs([tokenizer.eos_id], ids)
        return TokenLogprobs(ids, [tokenizer.decode([token]) for token in ids], logprobs)

    def to_transformers(self) -> tuple[Any, Any]:
        """Return (model, tokenizer) as the transformers library has them, in fp32 on the CPU.
        Raises UserError where it has no such architecture."""
        model = as_transformers(self.trained).model
        return model, transformers_tokenizer(self.trained)

    def _text_generator(self) -> TextGenerator:
        self._check_causal("continues no text")
        if self._generator is None:
            self._generator = build_generator(self.trained).generator
        return self._generator

    def _settings(self, sampling: dict[str, Any]) -> GenerateSettings:
        """Return the preset's settings with some of them changed; checked as a preset's are."""
        if isinstance(stop := sampling.get("stop"), Sequence) and not isinstance(stop, str):
            sampling = {**sampling, "stop": [*stop]}
        preset = self.trained.preset
        asked = merge(preset_json(preset), {"generate": sampling})
        return decode_preset(asked, type(preset), "the call", preset.lineage).generate

    def _check_causal(self, consequence: str) -> None:
        settings = self.trained.preset.model
        if objective_of(settings) != NEXT_TOKEN:
            raise UserError(
                f"{self.trained.where} holds a {settings.type}, which predicts masked tokens and "
                f'{consequence}. A preset with "job": "generate" fills in its masks.'
            )


def load_model(name: str | Path, home: str | Path | None = None) -> LoadedModel:
    """Load what `core.load` promises. Raises UserError."""
    here = Path.cwd()
    root = HOME if home is None else own_path(str(home), here)
    origin = str(own_path(str(name), here).resolve()) if is_file(str(name)) else str(name)
    read_dotenv(root / ".env")  # a model of the Hub may need a token
    weights = find_weights(origin, root)
    preset = _preset_of(weights)
    return LoadedModel(trained_of(weights, preset, root, detect_runtime()))


def _preset_of(weights: Weights) -> PresetBase:
    """Read the preset that weights were made with. Raises UserError where their file has none."""
    if weights.preset is None:
        raise UserError(
            f"{weights.where} has no preset with it, and weights alone do not say what they are "
            'of. Name a lineage, or a checkpoint of this program; a preset with "init_from" makes '
            "one of such weights."
        )
    preset = {**weights.preset, "init_from": None}
    return decode_preset(preset, Preset, weights.where, weights.preset["lineage"])
