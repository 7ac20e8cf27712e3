"""The optimizer: which parameters decay, which go to Muon, and its state by parameter name.

In:    a module's named parameters, the train section
Out:   Optimizer: one object over one or two torch optimizers
State: per-parameter tensors, saved under parameter names so that a changed model loads what still
fits"""

from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

from core.preset.settings import TrainSettings

NO_DECAY_NAMES = ("pos_embedding", "wpe", "alpha")
"""Tables of positions: rows that are rarely visited would only shrink. And PolyGLU's preferences,
as its authors have it."""


def _eager(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A torch optimizer without the wrappers that keep its methods out of compiled code, where ours
    never are.

    They do nothing else, and the first call of one imports the compiler: over a second of a start
    that compiles nothing."""
    methods = {
        "add_param_group": unwrap(kind.add_param_group),
        "step": torch.no_grad()(unwrap(kind.step)),
    }
    return type(kind.__name__, (kind,), methods)


AdamW, Muon = _eager(torch.optim.AdamW), _eager(torch.optim.Muon)


class Optimizer:
    """AdamW, or Muon for the trunk's matrices and AdamW for the rest.

    Matrices decay; biases, norms (ndim < 2) and position tables do not. Every trainable parameter
    is in exactly one group."""

    def __init__(
        self,
        named_parameters: list[tuple[str, nn.Parameter]],
        embeddings: set[str],
        settings: TrainSettings,
    ):
        """`embeddings`: names of embedding and readout tables, which Muon must not take (its update
        is for linear maps); and of auxiliary heads, which are no part of the trunk."""
        trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
        muon = {
            name
            for name, p in trainable
            if settings.optimizer == "muon"
            and p.ndim == 2
            and name not in embeddings
            and not _no_decay(name, p)
        }
        decay = [p for name, p in trainable if name not in muon and not _no_decay(name, p)]
        plain = [p for name, p in trainable if name not in muon and _no_decay(name, p)]
        self._names = {id(p): name for name, p in trainable}
        self._peaks: list[tuple[dict, float]] = []
        groups = [
            {"params": decay, "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self._optimizers: list[torch.optim.Optimizer] = []
        if groups := [group for group in groups if group["params"]]:
            how = {
                "lr": settings.learning_rate,
                "betas": settings.betas,
                "eps": settings.eps,
                "fused": True,
            }
            self._optimizers.append(AdamW(groups, **how))
            self._peaks += [
                (group, settings.learning_rate) for group in self._optimizers[-1].param_groups
            ]
        if muon:
            matrices = [p for name, p in trainable if name in muon]
            self._optimizers.append(
                Muon(
                    matrices,
                    lr=settings.muon_learning_rate,
                    weight_decay=settings.weight_decay,
                    momentum=0.95,
                )
            )
            self._peaks += [
                (group, settings.muon_learning_rate) for group in self._optimizers[-1].param_groups
            ]
        grouped = [
            id(p) for o in self._optimizers for group in o.param_groups for p in group["params"]
        ]
        assert sorted(grouped) == sorted(self._names), (
            f"{len(grouped)} parameters in groups, {len(self._names)} trainable"
        )

    def step(self, learning_rate_factor: float) -> None:
        """One update, at this fraction of each group's peak learning rate."""
        for group, peak in self._peaks:
            group["lr"] = peak * learning_rate_factor
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for group, _ in self._peaks:
            for p in group["params"]:
                p.grad = None

    def state(self) -> dict[str, dict[str, Any]]:
        """{parameter name: its tensors and numbers}."""
        return {
            self._names[id(p)]: dict(state)
            for o in self._optimizers
            for p, state in o.state.items()
        }

    def state_bytes(self) -> int:
        """What `state()` takes once every parameter has been updated."""
        tables = [
            (1 if isinstance(o, Muon) else 2, group["params"])
            for o in self._optimizers
            for group in o.param_groups
        ]
        return sum(count * p.numel() * p.element_size() for count, params in tables for p in params)

    def load(self, saved: dict[str, dict[str, Any]]) -> list[str]:
        """Take what fits by name and shape; returns the parameters that start with fresh state."""
        fresh = []
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    state = saved.get(self._names[id(p)], {})
                    kind = (
                        {"momentum_buffer"}
                        if isinstance(optimizer, Muon)
                        else {"step", "exp_avg", "exp_avg_sq"}
                    )
                    if set(state) != kind or any(
                        t.shape != p.shape
                        for t in state.values()
                        if isinstance(t, Tensor) and t.ndim
                    ):
                        fresh.append(self._names[id(p)])
                        optimizer.state.pop(p, None)
                        continue
                    optimizer.state[p] = {
                        # `step` stays where fused AdamW wants it: with the parameter, in fp32
                        key: value.to(p.device).clone() if isinstance(value, Tensor) else value
                        for key, value in state.items()
                    }
        return fresh


def _no_decay(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim < 2 or any(part in NO_DECAY_NAMES for part in name.split("."))
