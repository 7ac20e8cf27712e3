"""The linear readout: hidden states to logits, with a weight of its own or the embedding's.

In:    tensors the model owns: `lm_head.weight`, `lm_head.bias`, `embedding.weight`
Out:   a Readout (core/contracts.py) for ModelOutput
State: none
"""

import torch.nn.functional as F
from torch import Tensor

# n positions, D hidden_size, V vocab_size


class LinearReadout:
    """scores = hidden @ weight.T + bias.

    Not a module, so that the owning model's state dict keeps its names. The model makes one in its forward:
    `LinearReadout(self.lm_head.weight, self.lm_head.bias, self.embedding.weight)`, or, if tied,
    `LinearReadout(self.embedding.weight)`.
    """

    provides = "logits"

    def __init__(self, weight: Tensor, bias: Tensor | None = None, table: Tensor | None = None):
        self.weight = weight  # (V, D)
        self.bias = bias  # (V,)
        self.table = weight if table is None else table  # (V, D)

    @property
    def linear(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias

    def __call__(self, hidden: Tensor) -> Tensor:  # (n, D) -> (n, V)
        return F.linear(hidden, self.weight, self.bias)

    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]
