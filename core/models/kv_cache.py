"""The keys and values a model has computed for the texts it is extending, so that the next tokens
need only their own.

In:    keys and values of new positions, layer by layer
Out:   keys and values of every position so far
State: one buffer of each per layer, which doubles when it is full; `state`, for what else a model
has to remember

B batch rows, K key-value heads, Dh head width, t new positions, n positions so far
"""

from torch import Tensor

FIRST_CAPACITY = 64
"""Positions there is room for at first, where the first piece is shorter."""


class KeyValueCache:
    """Keys and values of a batch of texts of one length: no padding, every row has as many
    positions as the others.

    A model's `extend` reads `length` before its layers (it is the position of the first new token),
    and each layer then attends over what `extend` gives it: `attend_to_past` in
    core/models/attention.py."""

    def __init__(self, num_layers: int):
        # each (B, K, capacity, Dh)
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._lengths = [0] * num_layers
        self._begin = 0  # of the last piece that was read
        self.state: dict[str, Tensor] = {}
        """What a model keeps besides, such as the sum of what it has pooled: (B, t, ...), after
        each position of the last one."""

        self.fixed: dict[str, Tensor] = {}
        """What a model needs at every piece and does not depend on the text: computed once."""

    @property
    def length(self) -> int:
        """Positions that every layer holds: amid an `extend`, those before the new ones, until the
        last layer has them."""
        return min(self._lengths)

    def cut(self, length: int) -> None:
        """Forget all positions after the first `length`, as if they had never been read. One of the
        last piece has to stay."""
        assert self._begin < length <= self.length, (
            f"{length} is not among the positions {self._begin + 1} to {self.length}"
        )
        self._lengths = [length] * len(self._lengths)
        self.state = {name: kept[:, : length - self._begin] for name, kept in self.state.items()}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, K, t, Dh) of new positions; returns those of all positions, (B, K, n,
        Dh), as views."""
        begin = self._begin = self._lengths[layer]
        end = begin + k.shape[2]
        keys, values = self._with_room(layer, k, v, end)
        keys[:, :, begin:end], values[:, :, begin:end] = k, v
        self._lengths[layer] = end
        return keys[:, :, :end], values[:, :, :end]

    def _with_room(self, layer: int, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The layer's buffers, able to hold `length` positions: twice as large as before where they
        were not."""
        buffers, begin = self._buffers[layer], self._lengths[layer]
        if buffers is not None and buffers[0].shape[2] >= length:
            return buffers
        capacity = max(length, 2 * begin, FIRST_CAPACITY)
        # zeros, because a product of a part of a buffer may read what lies beside that part, and
        # multiply it by 0
        roomier = tuple(x.new_zeros(*x.shape[:2], capacity, x.shape[3]) for x in (k, v))
        if buffers is not None:
            for new, old in zip(roomier, buffers):
                new[:, :, :begin] = old[:, :, :begin]
        self._buffers[layer] = (roomier[0], roomier[1])
        return roomier[0], roomier[1]
