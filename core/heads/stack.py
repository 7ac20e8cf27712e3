"""The auxiliary heads of a run: where they look in a step's rows, and the weighted sum of their
losses.

In:    AuxiliarySettings; the rows of a step, then what each forward pass gives
Out:   rows with places, and how many; a scalar to call backward on, and sums to report
State: the heads' parameters, named "policy.weight", "dynamics.0.weight", ...

A head is a module with
    weight_key                      the key of AuxiliarySettings that is its weight
    choose(batch, draws) -> (B, k)  the place it looks at in each row; its first number is where its
                                    gradient enters, or NOWHERE
    forward(seen, places, valid)    (B,) its loss in each row; anything finite where a row is not
                                    valid
and, where it has them,
    begin()                         what is done to freshly drawn weights
    apart = True                    its gradient reaches itself alone, and is clipped alone: the
                                    model trains as without it
    measure(seen, places, valid)    {what: (B,)} other numbers of held-out rows than its loss,
                                    without gradient
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from core.contracts import Batch, LanguageModel, ModelOutput, call_if_defined
from core.heads.inputs import NOWHERE, Seen
from core.preset.settings import AuxiliarySettings
from core.randomness import derive_seed
from core.schedules import changes, value_at

# B batch rows


class HeadStack(nn.ModuleDict):
    """The heads that a preset has switched on, by name."""

    def __init__(
        self,
        table: Mapping[str, Any],
        settings: AuxiliarySettings,
        hidden_size: int,
        vocab_size: int,
    ):
        """`vocab_size`: the number of scores that the readout gives."""
        names = [name for name in table if getattr(settings, f"enable_{name}")]
        super().__init__({name: table[name](settings, hidden_size, vocab_size) for name in names})
        self._weights = {name: getattr(settings, table[name].weight_key) for name in names}

    def apart(self) -> list[nn.Module]:
        """Heads that learn from the model, and the model nothing from them."""
        return [head for head in self.values() if getattr(head, "apart", False)]

    def weights(self, progress: float) -> dict[str, float]:
        return {name: value_at(weight, progress) for name, weight in self._weights.items()}

    def scheduled(self, progress: float) -> dict[str, float]:
        """{"policy.weight": 0.03}: the weights that change over the run, as they are now."""
        return {
            f"{name}.weight": value_at(w, progress)
            for name, w in self._weights.items()
            if changes(w)
        }

    def choose(self, batch: Batch, seed: int, step: int, rows: list[int]) -> Batch:
        """The batch with the places of all heads. They follow from the seed, the step, and each
        row's number in the step."""
        places = []
        for name, head in self.items():
            draws = torch.tensor([derive_seed(seed, "heads", name, step, row) for row in rows])
            places.append(head.choose(batch, draws))
        return replace(batch, places=dict(zip(self, places)))

    def count(self, batch: Batch) -> dict[str, int]:
        """The rows in which each head has a place."""
        assert batch.places is not None
        return {name: int((places[:, 0] != NOWHERE).sum()) for name, places in batch.places.items()}

    def look(
        self,
        model: LanguageModel,
        output: ModelOutput,
        batch: Batch,
        surprise: Any,
        cross_entropy: Any,
    ) -> Seen:
        """A forward pass as the heads see it; the last two as Seen has them. Called under the
        autocast of the pass, if there is one."""
        hidden, kind = output.hidden, output.hidden.device.type
        wide = torch.promote_types(hidden.dtype, torch.float32)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else wide
        return Seen(hidden, output.readout, batch, surprise, dtype, model, self, cross_entropy)

    def forward(
        self, seen: Seen, counts: Mapping[str, float], progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over heads of weight * sum over rows / count, with its graph; and each head's
        sum, without.

        `counts` are those of the whole optimizer step over all ranks, as for the losses on the
        vocabulary."""
        sums = {}
        # few numbers, all of them exact
        with torch.autocast(seen.hidden.device.type, enabled=False):
            for name in self:
                values, valid = self._losses(name, seen)
                sums[name] = torch.where(valid, values, 0.0).sum()
            weights = self.weights(progress)
            total = torch.stack(
                [weights[name] / max(counts[name], 1.0) * value for name, value in sums.items()]
            ).sum()
        return total, {name: value.detach() for name, value in sums.items()}

    @torch.no_grad()
    def measure(self, seen: Seen) -> dict[str, Tensor]:
        """{"policy": (2,), "planner.gain": (2,)}: of each head's loss, and of what else it
        measures, sum and number of rows."""
        found = {}
        with torch.autocast(seen.hidden.device.type, enabled=False):
            for name, head in self.items():
                values, valid = self._losses(name, seen)
                others = (
                    call_if_defined(
                        head, "measure", seen, seen.batch.places[name].clamp(min=0), valid
                    )
                    or {}
                )  # type: ignore[index]
                for told, each in {
                    name: values,
                    **{f"{name}.{what}": value for what, value in others.items()},
                }.items():
                    found[told] = torch.stack([torch.where(valid, each, 0.0).sum(), valid.sum()])
        return found

    def _losses(self, name: str, seen: Seen) -> tuple[Tensor, Tensor]:
        """Of one head: (B,) its loss in each row, and (B,) where that counts."""
        assert seen.batch.places is not None
        places = seen.batch.places[name]
        valid = places[:, 0] != NOWHERE
        return self[name](seen, places.clamp(min=0), valid), valid
