"""Gradients that lie in `p.grad`, and torch optimizers that hold the parameters themselves: what
the engines share that leave both as torch has them.

In:    a loss, the optimizers of a run
Out:   gradients clipped, updates made; what an optimizer keeps of each parameter
State: none
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from core.parallel.shards import full, like


class TorchUpdates:
    """Updates as torch makes them; see Engine in core/parallel/protocol.py."""

    _objective: nn.Module

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, groups: Sequence[Sequence[nn.Parameter]], max_norm: float) -> Tensor:
        norm, *norms = [full(nn.utils.clip_grad_norm_(group, max_norm)) for group in groups]
        return norm + 0.0 * sum(norms)

    def update(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.step()

    def forget(self) -> None:
        for parameter in self._objective.parameters():
            parameter.grad = None

    def rewriting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def state_of(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter
    ) -> Mapping[str, Any]:
        return optimizer.state.get(parameter, {})

    def keep_state(
        self,
        optimizer: torch.optim.Optimizer,
        parameter: nn.Parameter,
        state: Mapping[str, Any] | None,
    ) -> None:
        if state is None:
            optimizer.state.pop(parameter, None)
            return
        optimizer.state[parameter] = {
            # `step` stays where fused AdamW wants it: with the parameter, in fp32
            key: _placed(value, parameter) if isinstance(value, Tensor) else value
            for key, value in state.items()
        }

    def close(self) -> None:
        pass


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a copy of what an optimizer keeps of a parameter, kept as the parameter is."""
    return (like(value, parameter) if value.ndim else value.to(parameter.device)).clone()
