"""What training runs on: ranks, and an engine that lays the weights out over them.

In:    nothing
Out:   the Parallel and Engine protocols. Single and Processes are ranks; engines.py has the engines
State: none
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:  # the data pipeline imports this file, and stays free of torch
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class Parallel(Protocol):
    """The ranks of a run, as each of them sees them."""

    @property
    def rank(self) -> int:
        """This process, counted from 0."""

    @property
    def world_size(self) -> int:
        """The number of processes."""

    @property
    def device_group(self) -> "dist.ProcessGroup | None":
        """The process group that tensors on the device travel in; None where there is nobody to
        send them to."""

    def sum(self, numbers: list[float]) -> list[float]:
        """Add up over the ranks, element by element. Every rank must call it."""

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank, on every rank."""

    def broadcast(self, value: T) -> T:
        """Return rank 0's value, on every rank."""

    def close(self) -> None:
        """Leave the group."""


class Engine(Protocol):
    """Keeps weights, gradients and the optimizer's state on the ranks' devices. Every rank calls
    every method, in the same order:

    at the start   place; weights are filled in; wrap; keep_state of each parameter
    a step         (one_pass around the loss and backward) x micro-batches; clip; update, unless a
                   number is not finite; rewriting, where the model changes weights itself; forget
    between        trial, before a GPU's first step; whole, for an evaluation; weights_of, state_of
                   and collect, for a checkpoint; rewriting and keep_state, for a roll-back
    at the end     close
    """

    name: str
    compiles: bool  # whether torch.compile may be used with it
    # the ranks on their hosts, where each of them saves its own share of the state; else rank 0
    # saves all of it, and this is None
    savers: "DeviceMesh | None"

    def place(self, model: "nn.Module", heads: "nn.Module | None", device: "torch.device") -> None:
        """Put model and auxiliary heads on the device, whole or each rank's share of them.
        Parameters are other objects afterwards."""

    def wrap(
        self, objective: "nn.Module", optimizers: "Sequence[torch.optim.Optimizer]"
    ) -> "nn.Module":
        """Return the module to call in training, once model and heads are placed; its gradients are
        averaged over the ranks when the last backward pass of a step ends."""

    def one_pass(self, module: "nn.Module", last: bool) -> AbstractContextManager[None]:
        """Surround forward and backward of one micro-batch; `last` of a step."""

    def backward(self, loss: "torch.Tensor") -> None:
        """Compute the gradients of a micro-batch; those of a step's add up."""

    def clip(self, groups: "Sequence[Sequence[nn.Parameter]]", max_norm: float) -> "torch.Tensor":
        """Clip the gradient of each group of parameters to a norm of its own; returns the norm of
        the first group before that: not finite where any gradient is not."""

    def update(self, optimizers: "Sequence[torch.optim.Optimizer]") -> None:
        """Make one update with the gradients that are there."""

    def forget(self) -> None:
        """Drop the gradients, used or not."""

    def rewriting(self) -> AbstractContextManager[None]:
        """Surround code that changes weights without an optimizer, on every rank alike."""

    def state_of(
        self, optimizer: "torch.optim.Optimizer", parameter: "nn.Parameter"
    ) -> Mapping[str, Any]:
        """Return what an optimizer keeps of a parameter, whole or this rank's share; nothing before
        its first update."""

    def keep_state(
        self,
        optimizer: "torch.optim.Optimizer",
        parameter: "nn.Parameter",
        state: Mapping[str, Any] | None,
    ) -> None:
        """Let an optimizer go on from the whole state of a parameter; None: from nothing."""

    def trial(self) -> AbstractContextManager[None]:
        """Surround a pass that may fail on one rank alone: nothing is exchanged, its numbers mean
        nothing, and no gradient is left."""

    def whole(self) -> AbstractContextManager[None]:
        """While it lasts every rank holds all weights as plain tensors, and may compute on its
        own; they must not change."""

    def weights_of(self, module: "nn.Module") -> "dict[str, torch.Tensor]":
        """Return a module's whole tensors by name on rank 0, in memory of the host where they are
        copies; those with several names once. Other ranks may get none."""

    def collect(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """The same for what an optimizer keeps, by parameter."""

    def close(self) -> None:
        """Give back what would outlive the run."""
