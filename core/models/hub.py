"""A causal language model of the Hugging Face Hub, or of a folder in its format: architecture, and
published weights.

In:    a repository's or folder's config.json; its weights, where a lineage starts fresh; Batch
Out:   ModelOutput(hidden (B, T, D), LinearReadout)
State: parameters under their published names
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from core.errors import UserError
from core.hf_hub import explain, why_unreachable
from core.models.huggingface import HuggingFaceLM, configure, obstacle, transformers
from core.models.published import folder_of, place_of, refuse_new_tokenizer, tokenizer_hint
from core.preset.settings import ModelSettings

WORKING = "GPT-2 (gpt2, distilgpt2), Llama, Mistral, Qwen2 and Qwen3, Pythia, OPT and SmolLM"
"""Some of the architectures that pass `obstacle`; tests/models/test_huggingface.py tries them."""


class HubSettings(ModelSettings):
    """A causal language model of the Hugging Face Hub."""

    type: Literal["hub"] = "hub"
    name: str = Field(min_length=1)
    """Repository, such as "distilgpt2", or a folder with config.json and weights, relative to the
    project, such as "./mine"."""
    pretrained: bool = True
    """Start from the published weights; false: from random ones."""
    seq_length: int = Field(512, ge=2, le=10_000_000)
    """Tokens a row of training text has: at most the positions the model knows."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout probability, wherever the architecture has dropout."""

    @property
    def folder(self) -> Path | None:
        """The folder where the model lies if it is not on the Hub."""
        return folder_of(self.name)

    @property
    def tokenizer_hint(self) -> str:
        """The line of a preset that names the model's own tokenizer."""
        return tokenizer_hint(self.name)

    @property
    def published(self) -> str | None:
        """The name of the published weights it starts from."""
        return self.name if self.pretrained else None

    def num_parameters(self, vocab_size: int) -> None:
        """Not known before the config is there, and the menu downloads nothing."""

    def summary(self) -> str:
        """Return what the menu says in place of a number of parameters."""
        what = self.name if self.pretrained else f"{self.name}'s architecture"
        return f"{what} from the Hub" if self.folder is None else what

    def check_tokenizer_section(self, tokenizer: Any) -> None:
        """Raises UserError if a preset's tokenizer cannot be the one that the published weights
        were trained with."""
        if self.pretrained:
            refuse_new_tokenizer(self.name, tokenizer, '"pretrained": false')


class Hub(HuggingFaceLM):
    """A model that AutoModelForCausalLM knows and `obstacle` finds nothing wrong with."""

    def __init__(self, settings: HubSettings, vocab_size: int):
        config = configure(_config(settings), settings.dropout)
        super().__init__(_build(settings, config))
        self.settings = settings
        self.tell_how_to_pack()
        if vocab_size > self.vocab_size:
            raise UserError(
                f'the tokenizer has {vocab_size:,} tokens, and model "{settings.name}" knows '
                f"{self.vocab_size:,}. Use its own: "
                f'{settings.tokenizer_hint}; or one that is smaller, with "pretrained": false in '
                "`model`."
            )

    def load_published(self, notes: list[str]) -> None:
        """Fetch and load the published weights, as a lineage that starts fresh wants. Raises
        UserError.

        They go from the library's model into this one by name: its own loading leaves some buffers
        undefined."""
        if not self.settings.pretrained:
            return
        kind = transformers().AutoModelForCausalLM
        # or a thread asks a service of the Hub to convert weights that are not in safetensors
        os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
        random = torch.get_rng_state()
        published, info = _fetch(
            self.settings,
            "weights",
            lambda name, **how: kind.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, **how
            ),
        )
        torch.set_rng_state(random)
        if lacking := sorted(
            {*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])}
        ):
            raise UserError(
                f'the weights of "{self.settings.name}" lack {len(lacking)} parts of its '
                f"architecture: {', '.join(lacking[:4])}. "
                'They are of another kind of model; choose another, or write "pretrained": false.'
            )
        self.load_state_dict(published.state_dict(), strict=True)
        notes.append(
            f"starts from the published weights of {self.settings.name}, from "
            f"{place_of(self.settings.name)}"
        )


def _config(settings: HubSettings) -> Any:
    """The architecture's config. Raises UserError if it cannot be had, or is not that of a causal
    model with room for a row."""
    library, name = transformers(), settings.name
    config = _fetch(settings, "config", library.AutoConfig.from_pretrained)
    if type(config) not in library.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f'model "{name}" is of type "{config.model_type}", which is no causal language model. '
            f"Choose one that continues text, for instance {WORKING}."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f'the weights of "{name}" are quantized, and cannot be trained. Take the repository '
            "they were made from."
        )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and settings.seq_length > positions:
        raise UserError(
            f'model "{name}" knows {positions:,} positions, and model.seq_length is '
            f"{settings.seq_length:,}. "
            f'Write "seq_length": {positions} or less.'
        )
    return config


def _build(settings: HubSettings, config: Any) -> Any:
    """The library's model with random weights. Raises UserError if it cannot be had, or is not one
    that can be trained here."""
    try:
        model = transformers().AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
        why = obstacle(model)
    except Exception as error:
        # whatever an architecture's own code raises where it does not fit this machine or the trial
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f'model "{settings.name}" cannot be built: {type(error).__name__}: {text}'
        ) from None
    if why is not None:
        raise UserError(
            f'model "{settings.name}" cannot be trained here: {why}. What works is, for instance, '
            f"{WORKING}."
        )
    return model


def _fetch(settings: HubSettings, what: str, load: Callable[..., Any]) -> Any:
    """Fetch what `load` makes of a repository or a folder; from the local cache where the Hub is
    out of reach. Raises UserError."""
    name, folder = settings.name, settings.folder
    if folder is not None and not (folder / "config.json").is_file():
        raise UserError(
            f'model "{name}": there is no {folder / "config.json"}. Correct model.name.'
        )
    unreachable = "" if folder is not None else why_unreachable()
    local = folder is not None or bool(unreachable)
    try:
        return load(str(folder or name), local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text or "model type" in text or "model_type" in text:
            reason = (
                "it needs code that the installed transformers has not, and code from the "
                f"Hub is never run ({text[:160]})"
            )
        elif folder is not None:
            reason = text[:300]
        else:
            reason = unreachable or explain(error, name, kind="")
        raise UserError(
            f'the {what} of model "{name}" could not be loaded from {place_of(name)}: '
            f"{reason}\nCheck model.name and the network"
            ', or train an architecture from random weights, such as "model": {"type": "gpt2"}, '
            "which needs no Hub."
        ) from None
