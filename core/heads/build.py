"""The auxiliary heads of a preset: made for a model, checked against it, and put back from a
checkpoint.

In:    AuxiliarySettings, a model's output; a checkpoint's heads
Out:   a HeadStack, and what is told of it
State: none
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from core.checkpoint.fitting import LINEAGE_OF_ITS_OWN, load_model
from core.contracts import Batch, LanguageModel, ModelOutput
from core.errors import UserError
from core.heads import HEADS
from core.heads.stack import HeadStack
from core.losses.stack import LossStack
from core.models.initial import draw_weights
from core.preset.base import PresetBase
from core.preset.settings import MASKED_TOKENS, AuxiliarySettingsBase, objective_of
from core.randomness import derive_seed


def output_of_one_token(model: nn.Module, device: torch.device) -> ModelOutput:
    """Call a model on one token, the least there is: hidden (1, 1, D) and its readout."""
    one = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.no_grad():
        return model(Batch(one, one, one, one.int(), one.int(), packed=False))


def build_heads(
    settings: AuxiliarySettingsBase, seed: int, output: ModelOutput
) -> HeadStack | None:
    """The heads that are switched on, with weights that follow from the seed; None where none is.

    `output`: of the model they are for.
    """
    scores = output.readout(output.hidden[0, :1])  # (1, V)
    heads = HeadStack(HEADS, settings, output.hidden.shape[-1], scores.shape[-1])
    for name, head in heads.heads.items():  # one head's beginning does not depend on the others
        torch.manual_seed(derive_seed(seed, "init", "heads", name))
        head.apply(draw_weights)
        head.begin()
    return heads.to(output.hidden.device) if len(heads) else None


def check_heads(preset: PresetBase, model: LanguageModel, stack: LossStack) -> None:
    """Check that the auxiliary heads that are on have something to learn; else raise UserError."""
    if not preset.auxiliary.heads:
        return
    keys = ", ".join(f"auxiliary.{key}" for key in preset.auxiliary.heads)
    if not model.is_causal:
        masked = objective_of(preset.model) == MASKED_TOKENS
        why = "predicts masked tokens" if masked else "is not causal: its positions see later ones"
        raise UserError(
            f"{keys}: heads predict what comes, but this model {why}. Set them to false, or take "
            "another model."
        )
    on = [name for name in HEADS if f"enable_{name}" in preset.auxiliary.heads]
    for name in on:
        head = HEADS[name][1]
        head.check(preset.auxiliary, preset.model.seq_length, preset.train.per_gpu_batch_size)
        if missing := [other for other in head.needs if other not in on]:
            others = ", ".join(f"auxiliary.enable_{other}" for other in missing)
            raise UserError(
                f"auxiliary.enable_{name} builds on heads that are off. Set {others} to true, or "
                "it to false."
            )
    if twice := sorted({loss.name for loss in stack.losses} & HEADS.keys()):
        raise UserError(
            f"losses: {', '.join(twice)} is the name of an auxiliary head; give the loss another "
            '"name".'
        )


def load_heads(heads: HeadStack | None, saved: Mapping[str, Tensor]) -> list[str]:
    """Put a checkpoint's heads in their places; tells which begin untrained, and which are left
    out."""
    own, there = set(heads or ()), {name.split(".")[0] for name in saved}
    if heads is not None:
        where, both = "the checkpoint's auxiliary heads", own & there
        load_model(
            heads,
            dict(saved),
            where,
            lambda name: name.split(".")[0] not in both,
            LINEAGE_OF_ITS_OWN,
        )
    notes = [
        f"auxiliary head {name} is new: starts untrained" for name in HEADS if name in own - there
    ]
    return notes + [
        f"auxiliary head {name} of the checkpoint is off and was left out"
        for name in sorted(there - own)
    ]
