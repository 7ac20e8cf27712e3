"""How a trained model speaks: with the planner, drafts and memory it was trained with, as far as
the preset wants them.

In:    Trained
Out:   a Voice, its planner whether in use or not, and what a person is told of them
State: none
"""

from functools import partial
from typing import Any

from core.errors import UserError
from core.generation.engine import Guide, Voice
from core.generation.speculative import Drafter, can_draft
from core.heads.build import output_of_one_token
from core.trained import Trained


def voice_of(trained: Trained) -> tuple[Voice, Guide | None, list[str]]:
    """What speaks, a planner it could use, remarks. Raises UserError where the preset asks for a
    planner that was not trained."""
    wanted, model = trained.preset.generate, trained.model
    heads: Any = trained.heads() or {}
    planner, drafter, told = _planner(trained, heads), None, []
    if wanted.planner:
        if planner is None:
            why = f"{trained.where} was trained without a planner"
            raise UserError(
                f"generate.planner: {why}. Train with auxiliary.enable_planner, or set it to false."
            )
        of_heads = trained.preset.auxiliary
        told.append(
            f"its planner weighs {of_heads.planner_candidates} tokens, {of_heads.rollout_steps} "
            "steps ahead"
        )
    if "draft" in heads and wanted.draft == "auto":
        if can_draft(model):
            drafter = Drafter(heads["draft"])
            told.append(f"drafts up to {drafter.tokens} tokens at a time, and verifies them")
        else:
            told.append("without drafts: this model's cache cannot forget what was guessed wrong")
    memory = heads["memory"] if "memory" in heads and wanted.memory else None
    if memory is not None:
        told.append("what no longer fits is remembered in a summary")
    guide = planner if wanted.planner else None
    context = trained.preset.model.seq_length
    return Voice(model, trained.tokenizer, context, guide, drafter, memory), planner, told  # type: ignore[arg-type]


def _planner(trained: Trained, heads: Any) -> Guide | None:
    if "planner" not in heads:
        return None
    table = output_of_one_token(
        trained.model, next(trained.model.parameters()).device
    ).readout.table
    return partial(heads["planner"].plan, heads=heads, table=table)
