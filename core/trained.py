"""A trained model, ready for use: what evaluation, generation and interpretation begin with.

In:    a preset: its `init_from`, or else its own lineage; the project's root folder; the runtime
Out:   Trained: the model with its weights, its tokenizer, and the preset that describes it; its
       TextGenerator, with the planner, drafts and memory that it was trained with
State: none; checkpoints are only read
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from core.assembly.start import tokenizer_state_of
from core.checkpoint.weights import Weights, find_weights, newest_weights
from core.contracts import LanguageModel, call_if_defined
from core.data.tokenizer import Tokenizer
from core.errors import UserError
from core.generation.engine import Guide, TextGenerator
from core.generation.speculative import Drafter, can_draft
from core.heads.build import build_heads, load_heads, output_of_one_token
from core.heads.draft import Draft
from core.heads.head import Head
from core.heads.memory import Memory
from core.heads.planner import Planner, PlannerSettings
from core.heads.stack import HeadStack
from core.models import build_model
from core.preset.base import PresetBase
from core.preset.decode import decode_preset
from core.preset.merge import preset_json
from core.runtime import Runtime

P = TypeVar("P", bound=PresetBase)


@dataclass
class Trained(Generic[P]):
    """A model as it was when its weights were saved.

    model         on the runtime's device, in evaluation mode, its schedules where they stood
    preset        the requested one, with the `model`, `tokenizer` and `auxiliary` sections that the
                  weights were made with
    where         the file, as it is shown on the screen
    tokens        that the weights were trained on
    made_with     the resolved preset that the weights were made with, as JSON
    held_out      the documents they were not trained on, as `open_corpus` takes them
    saved_heads   the weights of auxiliary heads
    receipt       fingerprint of the data that was read, in order
    init_from     the weights that the lineage began with
    """

    model: LanguageModel
    tokenizer: Tokenizer
    preset: P
    where: str
    step: int | None
    notes: list[str] = field(default_factory=list)
    tokens: int | None = None
    made_with: dict[str, Any] | None = None
    held_out: dict[str, Any] | None = None
    saved_heads: dict[str, Tensor] = field(default_factory=dict)
    receipt: str | None = None
    init_from: str | None = None

    def heads(self) -> HeadStack | None:
        """Build the auxiliary heads that were trained with the model, ready for use; None where
        there are none."""
        if not self.saved_heads:
            return None
        device = next(self.model.parameters()).device
        heads = build_heads(self.preset.auxiliary, 0, output_of_one_token(self.model, device))
        if heads is not None:
            load_heads(heads, self.saved_heads)
            heads.eval().requires_grad_(False)
        return heads


def load_trained(preset: P, root: Path, runtime: Runtime) -> Trained[P]:
    """Load the model that `preset.init_from` names, or else the newest one of the preset's lineage.
    Raises UserError."""
    if preset.init_from:
        weights = find_weights(preset.init_from, root)
    else:
        weights = newest_weights(preset.lineage, root)
    return trained_of(weights, preset, root, runtime)


def trained_of(weights: Weights, preset: P, root: Path, runtime: Runtime) -> Trained[P]:
    """Build the model that these weights are of. Raises UserError.

    preset   says what they do not say themselves
    """
    preset, notes = _as_made(preset, weights)
    tokenizer = Tokenizer.from_state(tokenizer_state_of(weights, preset.tokenizer, root))
    model = build_model(preset, tokenizer.vocab_size)
    notes += weights.load_into(model)
    model.to(runtime.device).eval()
    call_if_defined(model, "set_progress", weights.fraction)
    return Trained(
        model=model,
        tokenizer=tokenizer,
        preset=preset,
        where=weights.where,
        step=weights.step,
        notes=[*weights.notes, *notes],
        tokens=weights.tokens,
        made_with=weights.preset,
        held_out=weights.held_out,
        saved_heads=weights.heads,
        receipt=weights.receipt,
        init_from=weights.init_from,
    )


def _as_made(preset: P, weights: Weights) -> tuple[P, list[str]]:
    """Return the preset with the sections that the weights were made with, where their file has
    them, and a note of what differs."""
    if weights.preset is None:
        return preset, []
    sections = [key for key in ("model", "tokenizer", "auxiliary") if key in weights.preset]
    made: dict[str, Any] = {key: weights.preset[key] for key in sections}
    resolved = {**preset_json(preset), **made}
    as_made = decode_preset(resolved, type(preset), weights.where, preset.lineage)
    names_model = "model" in preset.model_fields_set
    differences = weights.other_settings(preset.model) if names_model else []
    if not differences:
        return as_made, []
    differing = "; ".join(differences)
    return as_made, [f"the model is as in {weights.where}, not as the preset says: {differing}"]


@dataclass(frozen=True)
class GeneratorOptions:
    """A trained model's TextGenerator, and what else there is to know of it.

    planner   that it could use, whether it does or not
    notes     what it uses, for the screen
    """

    generator: TextGenerator
    planner: Guide | None
    notes: list[str]


def build_generator(trained: Trained[Any]) -> GeneratorOptions:
    """Build the generator of a trained model, with what the preset's `generate` section asks for.
    Raises UserError where that is a planner that was not trained."""
    settings, model = trained.preset.generate, trained.model
    stack = trained.heads()
    heads: dict[str, Head] = {} if stack is None else stack.heads
    planner = _planner(trained, heads)
    notes: list[str] = []
    if settings.planner:
        notes.append(_planner_note(trained, planner))
    drafter, draft = None, heads.get("draft")
    if isinstance(draft, Draft) and settings.draft == "auto":
        if can_draft(model):
            drafter = Drafter(draft)
            notes.append(f"drafts up to {drafter.tokens} tokens at a time, and verifies them")
        else:
            notes.append("without drafts: this model's cache cannot forget what was guessed wrong")
    memory = heads.get("memory")
    if not isinstance(memory, Memory) or not settings.memory:
        memory = None
    else:
        notes.append("what no longer fits is remembered in a summary")
    generator = TextGenerator(
        model=model,
        tokenizer=trained.tokenizer,
        context=trained.preset.model.seq_length,
        guide=planner if settings.planner else None,
        drafter=drafter,
        memory=memory,
    )
    return GeneratorOptions(generator, planner, notes)


def _planner(trained: Trained[Any], heads: dict[str, Head]) -> Guide | None:
    planner = heads.get("planner")
    if not isinstance(planner, Planner):
        return None
    device = next(trained.model.parameters()).device
    table = output_of_one_token(trained.model, device).readout.table
    return partial(planner.plan, heads=heads, table=table)


def _planner_note(trained: Trained[Any], planner: Guide | None) -> str:
    settings = trained.preset.auxiliary
    if planner is None or not isinstance(settings, PlannerSettings):
        raise UserError(
            f"generate.planner: {trained.where} was trained without a planner. Train with "
            "auxiliary.enable_planner, or set it to false."
        )
    candidates, steps = settings.planner_candidates, settings.rollout_steps
    return f"its planner weighs {candidates} tokens, {steps} steps ahead"
