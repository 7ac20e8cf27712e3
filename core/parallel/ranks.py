"""Actions of rank 0, first or alone; a user's mistake that it meets is raised on every rank.

In:    the ranks (Single or Processes), an action
Out:   its result, on every rank; or its UserError, on every rank
State: none
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from core.errors import UserError, first_line
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


def on_all_ranks(parallel: Parallel, action: Callable[[], T], before: type[Exception]) -> T:
    """Run `action` on every rank; an error of one is raised on all, once no other rank waits for
    this one.

    before   a kind of error that goes before all others, and is raised as it is
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    told = None if failure is None else (isinstance(failure, before), first_line(failure))
    if failures := [each for each in parallel.gather(told) if each is not None]:
        goes_before, line = max(failures)
        raise before if goes_before else failure or RuntimeError(f"on another process: {line}")
    return cast(T, result)


def _attempt(action: Callable[[], Any]) -> Attempt:
    try:
        return Attempt(result=action())
    except UserError as error:
        return Attempt(error=error)
