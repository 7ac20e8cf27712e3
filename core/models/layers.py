"""What models are built from: attention that means the same on every backend.

In:    queries, keys, values, and who may attend to whom
Out:   mixed values
State: none

B batch, H heads, T time, Dh head width
"""

import torch
from torch import Tensor
from torch.nn import functional as F

EXPLICIT_UP_TO = 512
"""Rows up to which a CPU computes bf16 attention as two matrix products: its flash kernel's backward pass is slow on short
rows. On longer ones the T x T scores cost more than they save (docs/LOG.md)."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products of `x` will have: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def attention_bias(may_attend: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where True, -inf where False: made once per forward pass, added to the scores of every layer."""
    return torch.zeros(may_attend.shape, dtype=dtype, device=may_attend.device).masked_fill_(~may_attend, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(Dh) + bias) v, all (B, H, T, Dh).

    bias   (B, 1, T, T) from `attention_bias`, in q's dtype; None: plainly causal
    """
    if bias is None or q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[-2] > EXPLICIT_UP_TO:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, T)
    return torch.softmax(scores.add_(bias), dim=-1) @ v
