"""The auxiliary heads of a run: where they look in a step's rows, and the weighted sum of their
losses.

In:    the `auxiliary` section; the rows of a step, then what each forward pass gives
Out:   rows with positions, and how many; a scalar to call backward on, and sums to report
State: the heads' parameters, named "policy.weight", "dynamics.0.weight", ...
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from core.contracts import Batch, LanguageModel, ModelOutput
from core.heads.head import Head
from core.heads.inputs import NOWHERE, HeadInputs
from core.preset.settings import AuxiliarySettingsBase, Settings
from core.randomness import derive_seed
from core.schedules import changes, value_at

# B batch rows


class HeadStack(nn.ModuleDict):
    """The heads that a preset has switched on, by name."""

    def __init__(
        self,
        table: Mapping[str, tuple[type[Settings], type[Head]]],
        settings: AuxiliarySettingsBase,
        hidden_size: int,
        vocab_size: int,
    ):
        """`vocab_size`: the number of scores that the readout gives."""
        on = {name: head for name, (_, head) in table.items() if f"enable_{name}" in settings.heads}
        super().__init__(
            {name: head(settings, hidden_size, vocab_size) for name, head in on.items()}
        )
        self._weights = {name: getattr(settings, head.weight_key) for name, head in on.items()}

    @property
    def heads(self) -> dict[str, Head]:
        """The heads by name, in the order of the table."""
        return {name: head for name, head in self.items() if isinstance(head, Head)}

    def apart(self) -> list[Head]:
        """Return the heads that learn from the model while the model learns nothing from them."""
        return [head for head in self.heads.values() if head.apart]

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
        """The batch with the positions of all heads. They follow from the seed, the step, and each
        row's number in the step."""
        positions = []
        for name, head in self.heads.items():
            draws = torch.tensor([derive_seed(seed, "heads", name, step, row) for row in rows])
            positions.append(head.choose(batch, draws))
        return replace(batch, head_positions=dict(zip(self, positions)))

    def count(self, batch: Batch) -> dict[str, int]:
        """The rows in which each head has a place."""
        assert batch.head_positions is not None
        return {
            name: int((positions[:, 0] != NOWHERE).sum())
            for name, positions in batch.head_positions.items()
        }

    def inputs(
        self,
        model: LanguageModel,
        output: ModelOutput,
        batch: Batch,
        nll: Callable[[Tensor], Tensor],
        cross_entropy: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    ) -> HeadInputs:
        """Collect a forward pass for the heads; the last two arguments as HeadInputs has them.
        Called under the autocast of the pass, if there is one."""
        hidden, kind = output.hidden, output.hidden.device.type
        wide = torch.promote_types(hidden.dtype, torch.float32)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else wide
        return HeadInputs(
            hidden, output.readout, batch, nll, dtype, model, self.heads, cross_entropy
        )

    def forward(
        self, inputs: HeadInputs, counts: Mapping[str, float], progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over heads of weight * sum over rows / count, with its graph; and each head's
        sum, without.

        `counts` are those of the whole optimizer step over all ranks, as for the losses on the
        vocabulary."""
        sums = {}
        # few numbers, all of them exact
        with torch.autocast(inputs.hidden.device.type, enabled=False):
            for name in self:
                values, valid = self._losses(name, inputs)
                sums[name] = torch.where(valid, values, 0.0).sum()
            weights = self.weights(progress)
            total = torch.stack(
                [weights[name] / max(counts[name], 1.0) * value for name, value in sums.items()]
            ).sum()
        return total, {name: value.detach() for name, value in sums.items()}

    @torch.no_grad()
    def measure(self, inputs: HeadInputs) -> dict[str, Tensor]:
        """{"policy": (2,), "planner.gain": (2,)}: of each head's loss, and of what else it
        measures, sum and number of rows."""
        found = {}
        with torch.autocast(inputs.hidden.device.type, enabled=False):
            for name, head in self.heads.items():
                values, valid = self._losses(name, inputs)
                others = head.measure(inputs, self._positions(name, inputs).clamp(min=0), valid)
                named = {f"{name}.{what}": each for what, each in others.items()}
                for key, each in {name: values, **named}.items():
                    found[key] = torch.stack([torch.where(valid, each, 0.0).sum(), valid.sum()])
        return found

    def _losses(self, name: str, inputs: HeadInputs) -> tuple[Tensor, Tensor]:
        """Compute one head's loss in each row (B,), and where it counts (B,)."""
        positions = self._positions(name, inputs)
        valid = positions[:, 0] != NOWHERE
        return self[name](inputs, positions.clamp(min=0), valid), valid

    @staticmethod
    def _positions(name: str, inputs: HeadInputs) -> Tensor:
        assert inputs.batch.head_positions is not None
        return inputs.batch.head_positions[name]  # (B, k)
