"""A trained model, ready to be looked at: what evaluation, interpretation and the like begin with.

In:    a preset: its `init_from`, or else its own lineage; the project's root folder; the runtime
Out:   Trained: the model with its weights, its tokenizer, and the preset that says what it is
State: none; checkpoints are only read
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from core.assembly.start import tokenizer_state_of
from core.checkpoint.weights import Weights, find_weights, newest_weights
from core.contracts import call_if_defined
from core.data.tokenizer import Tokenizer
from core.heads.build import build_heads, load_heads, output_of_one_token
from core.heads.stack import HeadStack
from core.models import build_model
from core.preset.decode import decode_preset
from core.preset.merge import preset_json
from core.runtime import Runtime


@dataclass
class Trained:
    """A model as it was when its weights were saved."""

    model: nn.Module  # on the runtime's device, in evaluation mode, its schedules where they stood
    tokenizer: Tokenizer
    # the one asked for, with the `model`, `tokenizer` and `auxiliary` sections that the weights
    # were made with
    preset: Any
    where: str  # the file, as people are told of it
    step: int | None
    notes: list[str] = field(default_factory=list)
    tokens: int | None = None  # that the weights were trained on
    made_with: dict[str, Any] | None = None  # the resolved preset they were made with, as JSON
    # what they were not trained on, as `open_corpus` takes it
    held_out: dict[str, Any] | None = None
    saved_heads: dict[str, Tensor] = field(default_factory=dict)

    def heads(self) -> HeadStack | None:
        """The auxiliary heads that were trained with it, ready for use; None where there were
        none."""
        if not self.saved_heads:
            return None
        device = next(self.model.parameters()).device
        heads = build_heads(self.preset.auxiliary, 0, output_of_one_token(self.model, device))
        if heads is not None:
            load_heads(heads, self.saved_heads)
            heads.eval().requires_grad_(False)
        return heads


def load_trained(preset: Any, root: Path, runtime: Runtime) -> Trained:
    """The model that `preset.init_from` names, or else the newest one of the preset's lineage.
    Raises UserError."""
    weights = (
        find_weights(preset.init_from, root)
        if preset.init_from
        else newest_weights(preset.lineage, root)
    )
    preset, notes = _as_made(preset, weights)
    tokenizer = Tokenizer.from_state(tokenizer_state_of(weights, preset.tokenizer, root))
    model = build_model(preset, tokenizer.vocab_size)
    notes += weights.load_into(model)
    model.to(runtime.device).eval()
    call_if_defined(model, "set_progress", weights.fraction)
    past = weights.tokens, weights.preset, weights.held_out, weights.heads
    return Trained(
        model, tokenizer, preset, weights.where, weights.step, [*weights.notes, *notes], *past
    )


def _as_made(preset: Any, weights: Weights) -> tuple[Any, list[str]]:
    """The preset with the sections that the weights were made with, where their file says so; what
    differs is told."""
    if weights.preset is None:
        return preset, []
    asked = preset_json(preset)
    made = {
        key: weights.preset[key]
        for key in ("model", "tokenizer", "auxiliary")
        if key in weights.preset
    }
    found = decode_preset({**asked, **made}, type(preset), weights.where, preset.lineage)
    told = weights.other_settings(preset.model) if "model" in preset.model_fields_set else []
    return found, [
        f"the model is as in {weights.where}, not as the preset says: {'; '.join(told)}"
    ] if told else []
