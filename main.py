"""zeroarg: run `python main.py`, choose a preset with the arrow keys, and it trains.

`torchrun --nproc_per_node=N main.py` does the same on many GPUs. There are no arguments: all
settings are in configs/*.json."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

STARTED = time.time()


def main() -> int:
    """Choose a preset on rank 0, send it to every rank, run its job. Return the exit code (see
    docs/guide.md)."""
    from core.errors import UserError
    from core.terminal import guard_streams, tell

    guard_streams()
    try:
        if arguments := sys.argv[1:]:
            raise UserError(
                f"main.py takes no arguments, but was given {' '.join(arguments)!r}. Settings are "
                "in configs/*.json."
            )
        launcher()(STARTED)
    except UserError as error:
        tell(f"\n{error}")
        return error.exit_code
    except KeyboardInterrupt:
        tell("\nstopped at once; the newest checkpoint is as it was")
        return 130
    return 0


def launcher() -> Callable[[float], None]:
    """Import what starts a run. Raises UserError where a package of requirements.txt is not
    there."""
    from core.errors import UserError

    try:
        from core.launch import launch
    except ModuleNotFoundError as error:
        lines = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
        if error.name not in {line.partition("==")[0].replace("-", "_") for line in lines}:
            raise
        raise UserError(
            f"{sys.executable} has no package {error.name}. This installs what main.py needs, and "
            "starts it:\n\n"
            "  python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
            ".venv/bin/python main.py\n\n"
            "From then on, start it with .venv/bin/python main.py"
        ) from None
    return launch


if __name__ == "__main__":
    sys.exit(main())
