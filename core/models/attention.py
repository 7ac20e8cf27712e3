"""Attention inside documents that means the same on every kernel: torch's SDPA, FlexAttention,
torch's varlen, flash-attn.

In:    a Batch, once per forward pass; queries, keys and values, once per layer
Out:   DocumentMask; mixed values
State: none

B batch, T time, H query heads, K key-value heads (H a multiple of K), Dh head width, n documents of
a batch"""

import inspect
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from core.contracts import Batch

Backend = Literal["sdpa", "flex", "varlen", "flash"]
# the type of a model's `attention` setting
Attention = Literal["auto", "sdpa", "flex", "varlen", "flash"]

EXPLICIT_UP_TO = 512
"""Rows up to which a CPU computes bf16 attention as two matrix products: its flash kernel's
backward pass is slow on short rows. On longer ones the T x T scores cost more than they save
(docs/LOG.md)."""


def choose_backend(
    requested: Attention, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[Backend, str | None]:
    """Choose what computes attention here; returns it, and a sentence for the user where that is
    not what was requested."""
    if requested == "auto" or requested == "sdpa":
        # auto stays with SDPA, which runs everywhere, until another backend is measured to be
        # faster
        return "sdpa", None
    obstacle = _obstacle(requested, device, dtype, head_dim)
    if obstacle is None:
        return requested, None
    return "sdpa", f'attention "{requested}": {obstacle}; torch\'s SDPA is used instead'


def _obstacle(
    requested: Backend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Return why a backend cannot train here; None if it can."""
    name = {"flex": "FlexAttention", "varlen": "torch's varlen_attn", "flash": "flash-attn"}[
        requested
    ]
    if device.type != "cuda":
        return f"{name} trains on CUDA GPUs only, and this is a {device.type.upper()}"
    if requested == "flex":
        if find_spec("triton") is None:
            return "FlexAttention needs the package triton, which is not installed"
        return (
            f"FlexAttention needs heads at least 16 wide, these have {head_dim}"
            if head_dim < 16
            else None
        )
    try:
        function = _ragged_function(requested)
    except ImportError as error:
        if requested == "flash":
            return f"the package flash-attn cannot be imported ({error}); pip install flash-attn"
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if requested == "varlen" and "enable_gqa" not in inspect.signature(function).parameters:
        return (
            f"varlen_attn of torch {torch.__version__} is an early one, without windows and "
            "grouped heads"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        return (
            f"{name} computes in bf16 or fp16, and this run in {str(dtype).removeprefix('torch.')}"
        )
    if head_dim % 8 or head_dim > 256:
        return (
            f"{name} needs a head width that is a multiple of 8 up to 256, these are "
            f"{head_dim} wide"
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{name} needs an Ampere GPU or a newer one"
    return None


# It asks the machine, which a compiled model must not do again at every step.
# torch.compiler.assume_constant_result sets the same mark, but imports the compiler for it: 1.4 s
# of every start.
_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products of `x` will have: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def document_starts(document_ids: Tensor) -> Tensor:
    """True at the first position of each document in its row: (B, T) -> (B, T)."""
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return first


def document_lengths(document_ids: Tensor) -> tuple[Tensor, int]:
    """Find where each document starts in the rows laid end to end, the total last: (n + 1,) int32;
    and the longest one's length.

    Waits for the device: the number of documents is the size of a tensor.
    """
    starts = document_starts(document_ids).flatten().nonzero().flatten()
    offsets = F.pad(starts, (0, 1), value=document_ids.numel()).int()  # (n + 1,)
    return offsets, int(offsets.diff().max())


@dataclass(frozen=True)
class DocumentMask:
    """The positions that see each other in a batch, in the form one backend wants. Made once per
    forward pass, used by every layer.

    A position sees its own document: up to itself if `causal`, else all of it. Padding is a
    document of its own."""

    backend: Backend
    dtype: torch.dtype  # in which q, k and v are multiplied
    causal: bool
    bias: Tensor | None = None  # sdpa: (B, 1, T, T), 0 or -inf; None: rows are plainly causal
    blocks: Any = None  # flex: a BlockMask
    offsets: Tensor | None = None  # varlen and flash: (n + 1,), see document_lengths
    longest: int = 0

    @classmethod
    def of(
        cls,
        batch: Batch,
        dtype: torch.dtype,
        head_dim: int,
        requested: Attention = "auto",
        causal: bool = True,
    ) -> "DocumentMask":
        """The mask of a batch, for the backend a model's setting leads to."""
        # padding is on the right, where causal attention never looks; a mask only costs
        if causal and not batch.packed:
            return cls("sdpa", dtype, causal)
        backend, _ = choose_backend(requested, batch.document_ids.device, dtype, head_dim)
        if backend == "flex" and not torch.is_grad_enabled():
            # evaluation runs uncompiled, and FlexAttention would write out (B, H, T, T) scores
            backend = "sdpa"
        return cls.on(backend, batch.document_ids, dtype, causal)

    @classmethod
    def on(
        cls, backend: Backend, document_ids: Tensor, dtype: torch.dtype, causal: bool
    ) -> "DocumentMask":
        """The mask of `document_ids` (B, T) for one backend."""
        if backend in ("varlen", "flash"):
            offsets, longest = document_lengths(document_ids)
            return cls(backend, dtype, causal, offsets=offsets, longest=longest)
        # (B, T): two documents never share one
        number = document_starts(document_ids).cumsum(1, dtype=torch.int32)
        if backend == "flex":
            return cls(backend, dtype, causal, blocks=_block_mask(number, causal))
        may_attend = number[:, :, None] == number[:, None, :]  # (B, T, T)
        if causal:
            time = torch.arange(number.shape[1], device=number.device)
            may_attend = may_attend & (time[:, None] >= time)
        bias = torch.zeros(may_attend.shape, dtype=dtype, device=number.device).masked_fill_(
            ~may_attend, float("-inf")
        )
        return cls(backend, dtype, causal, bias=bias[:, None])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v over what the mask lets each position see: q (B, H, T, Dh), k and
    v (B, K, T, Dh).

    Query head j reads key-value head j // (H / K). The result (B, H, T, Dh) is in the mask's dtype.
    """
    # autocast does this for SDPA alone
    q, k, v = q.to(mask.dtype), k.to(mask.dtype), v.to(mask.dtype)
    if mask.backend == "flex":
        return _attend_flex(q, k, v, mask)
    if mask.backend in ("varlen", "flash"):
        return _attend_ragged(q, k, v, mask)
    explicit = (
        q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= EXPLICIT_UP_TO
    )
    if mask.bias is None and not explicit:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
    if q.shape[1] != k.shape[1]:  # few of SDPA's kernels have enable_gqa together with a bias
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # (B, H, T, Dh)
    if not explicit:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bias)
    bias = mask.bias if mask.bias is not None else _causal_bias(q)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, T)
    return torch.softmax(scores.add_(bias), dim=-1) @ v


def _causal_bias(q: Tensor) -> Tensor:
    """0 at and before each position, -inf after it: (T, T)."""
    return torch.full((q.shape[-2],) * 2, float("-inf"), dtype=q.dtype, device=q.device).triu_(1)


def attend_to_past(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal attention of new positions over all so far: q (B, H, t, Dh) of the last t of n, k and
    v (B, K, n, Dh).

    dtype   in which they are multiplied, as in a DocumentMask; the result (B, H, t, Dh) has it
    """
    B, H, t, _ = q.shape
    K, n = k.shape[1:3]
    if t == n:
        return attend(q, k, v, DocumentMask("sdpa", dtype, causal=True))
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    # the heads that share keys and values as one head of more queries: nothing of the past is
    # copied
    rows = q.reshape(B, K, H // K * t, -1)
    may_attend = None
    if t > 1:
        # (H / K * t, n)
        may_attend = (
            torch.ones(t, n, dtype=torch.bool, device=q.device).tril(n - t).repeat(H // K, 1)
        )
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=may_attend).reshape(q.shape)


def _block_mask(number: Tensor, causal: bool) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def may_attend(b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = number[b, i] == number[b, j]
        return same & (i >= j) if causal else same

    B, T = number.shape
    return create_block_mask(may_attend, B, None, T, T, device=number.device)


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    # it is slow unless something compiles it
    alone = q.device.type == "cuda" and not torch.compiler.is_compiling()
    run = compiled(flex_attention) if alone else flex_attention
    return run(q, k, v, block_mask=mask.blocks, enable_gqa=q.shape[1] != k.shape[1])


@lru_cache
def compiled(function: Any) -> Any:
    """A function as one kernel for a GPU, made when it is first called; as it is where nothing can
    make one."""
    return torch.compile(function, dynamic=False) if find_spec("triton") else function


def _ragged_function(backend: Backend) -> Any:
    """The kernel's entry point. Raises ImportError."""
    if backend == "flash":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _attend_ragged(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask) -> Tensor:
    B, H, T, _ = q.shape
    grouped = k.shape[1] != H
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B T, H or K, Dh)
    lengths = mask.offsets, mask.offsets, mask.longest, mask.longest  # of queries and of keys
    run = _ragged_function(mask.backend)
    if mask.backend == "flash":
        exact = torch.are_deterministic_algorithms_enabled()
        out = run(q, k, v, *lengths, causal=mask.causal, deterministic=exact)  # (B T, H, Dh)
    else:
        out = run(q, k, v, *lengths, window_size=(-1, 0 if mask.causal else -1), enable_gqa=grouped)
    return out.unflatten(0, (B, T)).transpose(1, 2)  # (B, H, T, Dh)
