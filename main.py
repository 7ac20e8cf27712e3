"""zeroarg: `python main.py`, choose a preset with the arrow keys, and it trains.

`torchrun --nproc_per_node=N main.py` does the same on many GPUs.

There are no arguments. What there is to change stands in configs/*.json.
"""

import sys
import time

STARTED = time.time()


def main() -> int:
    """Choose a preset on rank 0, hand it to every rank, run its job. Returns the exit code (see docs/guide.md)."""
    from core.errors import UserError
    from core.terminal import guard_streams, tell

    guard_streams()
    try:
        if given := sys.argv[1:]:
            raise UserError(f"main.py takes no arguments, but was given {' '.join(given)!r}. Settings are in configs/*.json.")
        from core.launch import launch

        launch(STARTED)
    except UserError as error:
        tell(f"\n{error}")
        return error.exit_code
    except KeyboardInterrupt:
        tell("\nstopped at once; the newest checkpoint is as it was")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
