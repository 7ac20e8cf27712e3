"""What models of rotary positions and grouped-query attention share; each has names of its own for
the parameters, as published.

In:    queries, keys and values (B, T, H or K, Dh), normalised or not
Out:   mixed values (B, T, H Dh)
State: RoPE's tables

B batch, T time, D hidden_size, H num_heads, K num_kv_heads, Dh head_dim"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.models.attention import DocumentMask, attend, attend_to_past
from core.models.kv_cache import KeyValueCache


@dataclass(kw_only=True)
class AttentionPass:
    """State that the attention layers of one forward pass share."""

    mask: DocumentMask
    turn: tuple[Tensor, Tensor]  # RoPE's cosines and sines of these positions
    cache: KeyValueCache | None = None


def check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Raise ValueError for heads that do not fit each other, or cannot be turned."""
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads {num_kv_heads} does not divide num_heads {num_heads}")
    if head_dim % 2:
        raise ValueError(
            f"head_dim {head_dim} is odd, and rotary positions turn pairs; add or take one"
        )


def layer_bytes(width: int, inner: int, queries: int, keys: int, bf16: bool) -> int:
    """Count what one position leaves in one layer for the backward pass on a GPU: of attention and
    feed-forward layer their inputs before and after the norm; gate and up, `inner` numbers in all;
    queries, keys, values and their mix."""
    if bf16:
        return 16 * width + 2 * inner + 8 * (queries + keys)
    return 16 * width + 4 * inner + 16 * queries + 12 * keys


class RoPE(nn.Module):
    """Rotary positions (Su et al. 2021), half-split: coordinate i turns with coordinate i + Dh /
    2."""

    def __init__(self, head_dim: int, seq_length: int, theta: float, persistent: bool = True):
        """`persistent`: the tables stand among the saved weights."""
        super().__init__()
        self.cosines: Tensor
        self.sins: Tensor
        # (Dh / 2,)
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.arange(seq_length, dtype=torch.float64)[:, None] * frequencies  # (T, Dh / 2)
        self.register_buffer("cosines", angles.cos().float(), persistent=persistent)
        self.register_buffer("sins", angles.sin().float(), persistent=persistent)

    # (B, T) -> 2 x (B, T, 1, Dh / 2)
    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cosines[position_ids][:, :, None], self.sins[position_ids][:, :, None]


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:  # (B, T, H, Dh) -> (B, T, H, Dh)
    (cos, sin), (first, second) = turn, x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def mixed(q: Tensor, k: Tensor, v: Tensor, shared: AttentionPass, layer: int) -> Tensor:
    """Turn queries and keys, and mix the values: (B, T, H or K, Dh) -> (B, T, H Dh)."""
    q, k = rotate(q, shared.turn), rotate(k, shared.turn)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # (B, H or K, T, Dh)
    if shared.cache is None:
        found = attend(q, k, v, shared.mask)  # (B, H, T, Dh)
    else:
        found = attend_to_past(q, *shared.cache.extend(layer, k, v), shared.mask.dtype)
    return found.transpose(1, 2).flatten(2)
