"""The optimizer: which parameters decay, which go to Muon, and its state by parameter name.

In:    a module's named parameters, the train section
Out:   Optimizer: one object over one or two torch optimizers
State: per-parameter tensors, saved under parameter names so that a changed model loads what still
       fits
"""

from collections.abc import Iterator, Mapping
from inspect import unwrap
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from core.parallel.shards import full, like
from core.preset.train import TrainSettings

NO_DECAY_NAMES = ("pos_embedding", "wpe", "alpha")
"""Tables of positions: rows that are rarely visited would only shrink. And PolyGLU's preferences,
as its authors have it."""
Kind = TypeVar("Kind", bound=torch.optim.Optimizer)


def _eager(kind: type[Kind]) -> type[Kind]:
    """Return a torch optimizer without the wrappers that keep its methods out of compiled code.

    They do nothing else, ours are never compiled, and the first call of one imports the compiler:
    over a second of a start that compiles nothing."""
    methods = {
        "add_param_group": unwrap(kind.add_param_group),
        "step": torch.no_grad()(unwrap(kind.step)),
    }
    return type(kind.__name__, (kind,), methods)


AdamW = _eager(torch.optim.AdamW)


@_eager
class Muon(torch.optim.Muon):
    """torch's Muon, bit for bit, whose matrices may be sharded: the update is for a whole one, and
    is computed on every rank."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        looked_ahead = full(grad.lerp(momentum, group["momentum"]))  # (rows, columns)
        update = _zeropower_via_newtonschulz(
            looked_ahead, group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], p.shape)
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(like(update, p), alpha=-rate)


class Optimizer:
    """AdamW, or Muon for the trunk's matrices and AdamW for the rest.

    Matrices decay; biases, norms (ndim < 2) and position tables do not. Every trainable parameter
    is in exactly one group.

    no_muon   names of embedding and readout tables, which Muon must not take (its update is for
              linear maps); and of auxiliary heads, which are no part of the trunk
    """

    def __init__(
        self,
        named_parameters: list[tuple[str, nn.Parameter]],
        no_muon: set[str],
        settings: TrainSettings,
    ):
        trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
        self._names = {id(p): name for name, p in trainable}
        matrices, decay, plain = [], [], []
        for name, p in trainable:
            if p.ndim < 2 or any(part in NO_DECAY_NAMES for part in name.split(".")):
                plain.append(p)
            elif settings.optimizer == "muon" and p.ndim == 2 and name not in no_muon:
                matrices.append(p)
            else:
                decay.append(p)
        self._peaks: list[tuple[dict[str, Any], float]] = []  # a group, its peak learning rate
        self._optimizers: list[torch.optim.Optimizer] = []
        groups: list[dict[str, Any]] = [
            {"params": decay, "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        if groups := [group for group in groups if group["params"]]:
            rate, betas = settings.learning_rate, settings.betas
            self._add(AdamW(groups, lr=rate, betas=betas, eps=settings.eps, fused=True), rate)
        if matrices:
            rate, decay_rate = settings.muon_learning_rate, settings.weight_decay
            self._add(Muon(matrices, lr=rate, weight_decay=decay_rate, momentum=0.95), rate)
        grouped = [id(p) for group, _ in self._peaks for p in group["params"]]
        assert sorted(grouped) == sorted(self._names), (
            f"{len(grouped)} parameters in groups, {len(self._names)} trainable"
        )

    def _add(self, optimizer: torch.optim.Optimizer, peak: float) -> None:
        self._optimizers.append(optimizer)
        self._peaks += [(group, peak) for group in optimizer.param_groups]

    def step(self, learning_rate_factor: float) -> None:
        """Make one update, at this fraction of each group's peak learning rate."""
        for group, peak in self._peaks:
            group["lr"] = peak * learning_rate_factor
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for group, _ in self._peaks:
            for p in group["params"]:
                p.grad = None

    def state(self) -> dict[str, dict[str, Any]]:
        """Return the tensors and numbers of each parameter, by its name."""
        return {
            self._names[id(p)]: dict(state)
            for o in self._optimizers
            for p, state in o.state.items()
        }

    def state_bytes(self) -> int:
        """Return the bytes that `state()` takes once every parameter has been updated."""
        return sum(
            (1 if isinstance(optimizer, Muon) else 2) * p.numel() * p.element_size()
            for optimizer, p in self._parameters()
        )

    def load(self, saved: Mapping[str, Mapping[str, Tensor | float]]) -> list[str]:
        """Take the state that fits by name and shape; returns the names of the parameters that
        start with fresh state."""
        fresh = []
        for optimizer, p in self._parameters():
            name = self._names[id(p)]
            state = saved.get(name, {})
            if not _fits(optimizer, p, state):
                fresh.append(name)
                optimizer.state.pop(p, None)
                continue
            optimizer.state[p] = {
                # `step` stays where fused AdamW wants it: with the parameter, in fp32
                key: _placed(value, p) if isinstance(value, Tensor) else value
                for key, value in state.items()
            }
        return fresh

    def _parameters(self) -> Iterator[tuple[torch.optim.Optimizer, nn.Parameter]]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    yield optimizer, p


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a copy of what an optimizer keeps of a parameter, kept as the parameter is."""
    return (like(value, parameter) if value.ndim else value.to(parameter.device)).clone()


def _fits(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: Mapping[str, Tensor | float]
) -> bool:
    """Return whether a saved state is of this kind of optimizer, and of the parameter's shape."""
    muon, adamw = {"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}
    tensors = [t for t in state.values() if isinstance(t, Tensor) and t.ndim]
    return set(state) == (muon if isinstance(optimizer, Muon) else adamw) and all(
        t.shape == parameter.shape for t in tensors
    )
