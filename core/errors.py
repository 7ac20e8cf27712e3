"""The errors a user can meet. Each says what went wrong, where, and what to do; none ever shows a
traceback.

main.py prints the message and exits with the error's `exit_code` (0 done, 2 the user's mistake, 3
no data, 130 interrupted)."""


class UserError(Exception):
    """Something the user can mend."""

    exit_code = 2


class PresetError(UserError):
    """A preset that cannot be read or does not say what it must. Carries every problem found, not
    only the first."""

    def __init__(self, where: str, problems: list[str]):
        self.where, self.problems = where, problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"{where} has {count}\n" + "\n".join(f"  {problem}" for problem in problems)
        )


class CheckpointError(UserError):
    """A checkpoint that does not fit the preset, or that cannot be written."""


class MissingPackage(UserError):
    """An optional package that the preset needs and this machine lacks."""


class Diverged(UserError):
    """Training kept producing non-finite losses or gradients."""


class SourceUnavailable(Exception):
    """One source cannot be read (any more). Never fatal by itself: the source is dropped and the
    others go on."""


class ReadingFailed(UserError):
    """The data cannot be read on: an error that nobody expected, or data workers that are killed
    again and again."""


class NoData(UserError):
    """No source is left to read from."""

    exit_code = 3


class Interrupted(UserError):
    """Ctrl-C, SIGTERM or SIGHUP, after the checkpoint was saved."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """An error in one line, for a sentence that goes on after it; its name where it says
    nothing."""
    return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
