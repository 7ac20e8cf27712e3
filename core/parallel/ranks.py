"""What rank 0 does first or alone, and what it means for the others: a user's mistake it meets is
everybody's.

In:    the ranks (Single or DDP), an action
Out:   its result, on every rank; or its UserError, on every rank
State: none
"""

from collections.abc import Callable
from typing import Any

from core.errors import UserError


def on_rank_zero(parallel: Any, action: Callable[[], Any]) -> Any:
    """What `action` gives on rank 0, which alone runs it; sent to the others."""
    result, error = _tried(action) if parallel.rank == 0 else (None, None)
    result, error = parallel.broadcast((result, error))
    if error is not None:
        raise error
    return result


def rank_zero_first(parallel: Any, action: Callable[[], Any]) -> Any:
    """What `action` gives on each rank, where that cannot be sent; rank 0 runs it first, so that
    files are fetched once."""
    result, error = _tried(action) if parallel.rank == 0 else (None, None)
    if (error := parallel.broadcast(error)) is not None:
        raise error
    return result if parallel.rank == 0 else action()


def _tried(action: Callable[[], Any]) -> tuple[Any, UserError | None]:
    try:
        return action(), None
    except UserError as error:
        return None, error
