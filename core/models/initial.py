"""Initial weights of our own models: N(0, 0.02), biases 0 (Radford et al. 2019, section 2.3).

In:    a module
Out:   its own parameters, drawn from torch's generator
State: none
"""

import math

from torch import nn

STD = 0.02


def draw_weights(module: nn.Module) -> None:
    """Draw a linear map or an embedding table; any other module is left as it is."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def draw_residual(projection: nn.Linear, num_layers: int) -> None:
    """Draw a map that adds to the residual stream, two in each layer: narrower, so that the sum
    does not grow with depth."""
    nn.init.normal_(projection.weight, std=STD / math.sqrt(2 * num_layers))
