"""The auxiliary heads of a run: where they look in a step's rows, and the weighted sum of their losses.

In:    AuxiliarySettings; the rows of a step, then what each forward pass gives
Out:   rows with places, and how many; a scalar to call backward on, and sums to report
State: the heads' parameters, named "policy.weight", "dynamics.0.weight", ...

A head is a module with
    weight_key                      the key of AuxiliarySettings that is its weight
    choose(batch, draws) -> (B, k)  the place it looks at in each row; its first number is where its gradient enters, or NOWHERE
    forward(seen, places, valid)    (B,) its loss in each row; anything finite where a row is not valid
    begin()                         where it has one: what is done to freshly drawn weights
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from core.contracts import Batch
from core.heads.look import NOWHERE, Seen
from core.randomness import derive_seed
from core.schedules import changes, value_at
from core.settings import AuxiliarySettings

# B batch rows


class HeadStack(nn.ModuleDict):
    """The heads that a preset has switched on, by name."""

    def __init__(self, table: Mapping[str, Any], settings: AuxiliarySettings, hidden_size: int, vocab_size: int):
        """`vocab_size`: the number of scores that the readout gives."""
        names = [name for name in table if getattr(settings, f"enable_{name}")]
        super().__init__({name: table[name](settings, hidden_size, vocab_size) for name in names})
        self._weights = {name: getattr(settings, table[name].weight_key) for name in names}

    def weights(self, progress: float) -> dict[str, float]:
        return {name: value_at(weight, progress) for name, weight in self._weights.items()}

    def scheduled(self, progress: float) -> dict[str, float]:
        """{"policy.weight": 0.03}: the weights that change over the run, as they are now."""
        return {f"{name}.weight": value_at(w, progress) for name, w in self._weights.items() if changes(w)}

    def choose(self, batch: Batch, seed: int, step: int, rows: list[int]) -> Batch:
        """The batch with the places of all heads. They follow from the seed, the step, and each row's number in the step."""
        places = []
        for name, head in self.items():
            draws = torch.tensor([derive_seed(seed, "heads", name, step, row) for row in rows])
            places.append(head.choose(batch, draws))
        return replace(batch, places=dict(zip(self, places)))

    def count(self, batch: Batch) -> dict[str, int]:
        """The rows in which each head has a place."""
        assert batch.places is not None
        return {name: int((places[:, 0] != NOWHERE).sum()) for name, places in batch.places.items()}

    def forward(self, seen: Seen, counts: Mapping[str, float], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over heads of weight * sum over rows / count, with its graph; and each head's sum, without.

        `counts` are those of the whole optimizer step over all ranks, as for the losses on the vocabulary.
        """
        assert seen.batch.places is not None
        sums = {}
        with torch.autocast(seen.hidden.device.type, enabled=False):  # few numbers, all of them exact
            for name, head in self.items():
                places = seen.batch.places[name]
                valid = places[:, 0] != NOWHERE  # (B,)
                sums[name] = torch.where(valid, head(seen, places.clamp(min=0), valid), 0.0).sum()
            weights = self.weights(progress)
            total = torch.stack([weights[name] / max(counts[name], 1.0) * value for name, value in sums.items()]).sum()
        return total, {name: value.detach() for name, value in sums.items()}
