"""Actions of rank 0, first or alone; a user's mistake that it meets is raised on every rank.

In:    the ranks (Single or Processes), an action
Out:   its result, on every rank; or its UserError, on every rank
State: none
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from core.errors import UserError
from core.parallel.protocol import Parallel, T


@dataclass
class Attempt:
    """The result of an action, or the UserError that it met."""

    result: Any = None
    error: UserError | None = None


def on_rank_zero(parallel: Parallel, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone; returns its result, or raises its UserError, on every rank."""
    attempt = parallel.broadcast(_attempt(action) if parallel.rank == 0 else Attempt())
    if attempt.error is not None:
        raise attempt.error
    return cast(T, attempt.result)


def rank_zero_first(parallel: Parallel, action: Callable[[], T]) -> T:
    """Run `action` on every rank, where its result cannot be sent; rank 0 runs it first, so that
    files are fetched once. Raises rank 0's UserError on every rank."""
    attempt = _attempt(action) if parallel.rank == 0 else Attempt()
    if (error := parallel.broadcast(attempt.error)) is not None:
        raise error
    return cast(T, attempt.result) if parallel.rank == 0 else action()


def _attempt(action: Callable[[], Any]) -> Attempt:
    try:
        return Attempt(result=action())
    except UserError as error:
        return Attempt(error=error)
