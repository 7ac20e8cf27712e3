"""The base of every auxiliary head: a module that looks at a few positions of each row.

In:    a batch, to choose positions in; then a forward pass
Out:   a loss for each row
State: the parameters of the heads that build on this
"""

from typing import ClassVar

from torch import Tensor, nn

from core.contracts import Batch
from core.heads.inputs import HeadInputs
from core.preset.settings import Settings

# B batch rows, k positions of a head in a row


class Head(nn.Module):
    """The base of an auxiliary head: `Head(settings, hidden_size, vocab_size)`.

    A head defines `weight_key`, `choose` and
    `forward(inputs, positions (B, k), valid (B,)) -> (B,)`: its loss in each row, anything finite
    where a row is not valid.
    """

    weight_key: ClassVar[str]
    """The key of `auxiliary` that is its weight."""
    needs: ClassVar[tuple[str, ...]] = ()
    """The heads that it builds on."""
    apart: ClassVar[bool] = False
    """True: its gradient reaches itself alone and is clipped alone; the model trains as without
    it."""

    def choose(self, batch: Batch, draws: Tensor) -> Tensor:
        """Choose positions in each row: a batch, (B,) random int64 >= 0 -> (B, k).

        The first of a row is where the head's gradient enters, or NOWHERE.
        """
        raise NotImplementedError

    @classmethod
    def check(cls, settings: Settings, seq_length: int, rows: int) -> None:
        """Raise UserError where rows of `seq_length` tokens, `rows` of them in a forward pass,
        leave the head nothing to learn."""

    def begin(self) -> None:
        """Change freshly drawn weights; override it for other initial weights."""

    def measure(self, inputs: HeadInputs, positions: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Measure more than the loss on held-out rows: {what: (B,)}, without gradient."""
        return {}
