"""Steps in which no token is learned: they are passed over with one warning, and refused when there
are too many in a row.

In:    the steps that are passed over, one after the other
Out:   a warning; UserError
State: what was passed over since a token was learned
"""

from core.errors import UserError

MOST_TOKENS, MOST_STEPS = 1_000_000, 100
"""So much in a row without a token to learn is taken for data that never has one."""
WHY = "in its conversations the assistant says nothing, or only beyond the rows' length"
REMEDY = "Check the conversations, or raise model.seq_length or train.per_gpu_batch_size."


class Unlearned:
    """Steps passed over in a row. Where what is learned is random (`of_chance`), there is neither a
    warning nor a refusal."""

    def __init__(self, learned: bool, of_chance: bool):
        """`learned`: whether there has been a token to learn before."""
        self._learned, self._of_chance = learned, of_chance
        self._steps = self._tokens = 0
        self._example = ""
        self.warning: str | None = None  # to be told; whoever tells it puts None here

    @property
    def needs_example(self) -> bool:
        return not self._example and not self._of_chance

    def show(self, row: str) -> None:
        """Make the warning, from one row of the first such step."""
        self._example = f"One row, learned tokens in [[ ]]:\n{row}\n"
        begun = "a step was passed over, as others like it will be: no token of it is learned"
        self.warning = f"{begun}; {WHY}. {self._example}{REMEDY}"

    def learned(self) -> None:
        """Record a step that had something to learn."""
        self._learned, self._steps, self._tokens = True, 0, 0

    def add(self, tokens: int) -> None:
        """Record a step without a learned token. Raises UserError after too many."""
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens
        if self._tokens >= MOST_TOKENS and self._steps >= MOST_STEPS:
            self._refuse()

    def end(self) -> None:
        """Record the end of the data. Raises UserError if nothing of it was learned."""
        if self._steps and not self._learned:
            self._refuse()

    def _refuse(self) -> None:
        if not self._of_chance:
            raise UserError(
                f"no token of {self._steps:,} steps in a row, {self._tokens:,} tokens, is "
                f"learned: {WHY}. {self._example}{REMEDY}"
            )
