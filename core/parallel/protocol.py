"""The ranks that training runs on: one small interface over one process and many.

In:    nothing
Out:   the Parallel protocol, which Single and DDP fulfil
State: none

Numbers and objects travel over the host (gloo), gradients over the device's own backend.
"""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:  # the data pipeline imports this file, and stays free of torch
    from torch import nn

T = TypeVar("T")


class Parallel(Protocol):
    """The ranks of a run, as each of them sees them."""

    @property
    def rank(self) -> int:
        """This process, counted from 0."""

    @property
    def world_size(self) -> int:
        """The number of processes."""

    def wrap(self, module: "nn.Module") -> "nn.Module":
        """Return the module to call in training; its gradients are averaged over the ranks when
        a backward pass ends."""

    def accumulate(self, module: "nn.Module", last: bool) -> AbstractContextManager[None]:
        """Surround forward and backward of one micro-batch; only the `last` of a step exchanges
        gradients."""

    def sum(self, numbers: list[float]) -> list[float]:
        """Add up over the ranks, element by element. Every rank must call it."""

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank, on every rank."""

    def broadcast(self, value: T) -> T:
        """Return rank 0's value, on every rank."""

    def close(self) -> None:
        """Leave the group."""
