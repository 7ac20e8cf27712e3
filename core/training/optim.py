"""The optimizer: which parameters decay, which go to Muon, and its state by parameter name.

In:    a module's named parameters, the train section
Out:   Optimizer: one object over one or two torch optimizers
State: per-parameter tensors, saved under parameter names so that a changed model loads what still
       fits
"""

from collections.abc import Mapping
from inspect import unwrap
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from core.parallel.protocol import Engine
from core.parallel.replicated import Replicated
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


class Kept(NamedTuple):
    """A parameter, and the optimizer that updates it."""

    optimizer: torch.optim.Optimizer
    parameter: nn.Parameter
    shape: torch.Size  # of all of it: an engine may leave less in its place


class Optimizer:
    """AdamW, or Muon for the trunk's matrices and AdamW for the rest.

    Matrices decay; biases, norms (ndim < 2) and position tables do not. Every trainable parameter
    is in exactly one group.

    no_muon   names of embedding and readout tables, which Muon must not take (its update is for
              linear maps); and of auxiliary heads, which are no part of the trunk
    engine    where gradients and state lie
    """

    def __init__(
        self,
        named_parameters: list[tuple[str, nn.Parameter]],
        no_muon: set[str],
        settings: TrainSettings,
        engine: Engine | None = None,
    ):
        self._engine = engine or Replicated()
        trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
        names = {id(p): name for name, p in trainable}
        matrices, decay, plain = [], [], []
        for name, p in trainable:
            if p.ndim < 2 or any(part in NO_DECAY_NAMES for part in name.split(".")):
                plain.append(p)
            elif settings.optimizer == "muon" and p.ndim == 2 and name not in no_muon:
                matrices.append(p)
            else:
                decay.append(p)
        self._peaks: list[tuple[dict[str, Any], float]] = []  # a group, its peak learning rate
        self.optimizers: list[torch.optim.Optimizer] = []
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
        # by name: an engine may put other tensors into the groups
        self._kept = {
            names[id(p)]: Kept(optimizer, p, p.shape)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert self._kept.keys() == set(names.values()), (
            f"{len(self._kept)} parameters in groups, {len(names)} trainable"
        )

    def _add(self, optimizer: torch.optim.Optimizer, peak: float) -> None:
        self.optimizers.append(optimizer)
        self._peaks += [(group, peak) for group in optimizer.param_groups]

    def step(self, learning_rate_factor: float) -> None:
        """Make one update, at this fraction of each group's peak learning rate."""
        for group, peak in self._peaks:
            group["lr"] = peak * learning_rate_factor
        self._engine.update(self.optimizers)

    def state(self) -> dict[str, dict[str, Any]]:
        """Return the tensors and numbers of each parameter, by its name."""
        states = {
            name: dict(self._engine.state_of(kept.optimizer, kept.parameter))
            for name, kept in self._kept.items()
        }
        return {name: state for name, state in states.items() if state}

    def state_bytes(self) -> int:
        """Return the bytes that `state()` takes once every parameter has been updated."""
        return sum(
            4 * (1 if isinstance(kept.optimizer, Muon) else 2) * kept.shape.numel()
            for kept in self._kept.values()
        )

    def load(self, saved: Mapping[str, Mapping[str, Tensor | float]]) -> list[str]:
        """Take the state that fits by name and shape; returns the names of the parameters that
        start with fresh state."""
        fresh = []
        for name, kept in self._kept.items():
            state = saved.get(name, {})
            fits = _fits(kept, state)
            self._engine.keep_state(kept.optimizer, kept.parameter, state if fits else None)
            fresh += [] if fits else [name]
        return fresh


def _fits(kept: Kept, state: Mapping[str, Tensor | float]) -> bool:
    """Return whether a saved state is of this kind of optimizer, and of the parameter's shape."""
    muon, adamw = {"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}
    tensors = [t for t in state.values() if isinstance(t, Tensor) and t.ndim]
    return set(state) == (muon if isinstance(kept.optimizer, Muon) else adamw) and all(
        t.shape == kept.shape for t in tensors
    )
