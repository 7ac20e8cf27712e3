"""Attention equals a naive float64 one, computed document by document, on every backend that this
machine has.

B batch, T time, H query heads, K key-value heads, Dh head width
"""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.contracts import Batch
from core.models import attention
from core.models.attention import DocumentMask, attend, choose_backend, document_lengths

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
T, H, DH = 150, 4, 16  # longer than a block of FlexAttention (128), and no multiple of one
CPU, GPU = torch.device("cpu"), torch.device("cuda")

# documents of each row, their lengths; the last one of a row may as well be padding, which is a
# document of its own
LENGTHS = [[T], [1, 1, 40, 1, 100, 7], [60, 70, 19, 1], [1] * 20 + [130]]


def ids_of(lengths: list[list[int]]) -> Tensor:
    return torch.stack(
        [torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths]
    ).int()


def inputs(
    dtype: torch.dtype, num_kv_heads: int, device: torch.device = CPU
) -> tuple[list[Tensor], Tensor]:
    """([q, k, v], the gradient that flows into the output), as numbers that bf16 holds exactly."""
    rng = torch.Generator().manual_seed(4)
    B = len(LENGTHS)
    shapes = [(B, H, T, DH), (B, num_kv_heads, T, DH), (B, num_kv_heads, T, DH), (B, H, T, DH)]
    *qkv, grad = (
        torch.randn(shape, generator=rng).bfloat16().to(device, dtype) for shape in shapes
    )
    return qkv, grad


def naive(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, causal: bool) -> Tensor:
    """Each document is cut out, attends inside itself head by head, and is put back."""
    out = torch.zeros_like(q)
    for b, row in enumerate(document_ids.tolist()):
        edges = [0, *(t for t in range(1, len(row)) if row[t] != row[t - 1]), len(row)]
        for start, stop in zip(edges, edges[1:]):
            for h in range(q.shape[1]):
                kv = h // (q.shape[1] // k.shape[1])
                scores = q[b, h, start:stop] @ k[b, kv, start:stop].T / math.sqrt(q.shape[-1])
                if causal:
                    scores = scores + torch.full_like(scores, -math.inf).triu(1)
                out[b, h, start:stop] = scores.softmax(-1) @ v[b, kv, start:stop]
    return out


def check_parity(
    mask: DocumentMask,
    document_ids: Tensor,
    num_kv_heads: int,
    tolerance: float,
    backward: bool = True,
) -> None:
    """Forward, and gradients of q, k and v, against float64."""
    mine, grad = inputs(mask.dtype, num_kv_heads, document_ids.device)
    mine = [x.requires_grad_(backward) for x in mine]
    exact = [x.detach().double().cpu().requires_grad_() for x in mine]
    expected = naive(*exact, document_ids.cpu(), mask.causal)
    out = attend(*mine, mask)
    assert out.dtype == mask.dtype and out.shape == mine[0].shape
    torch.testing.assert_close(out.double().cpu(), expected, atol=tolerance, rtol=tolerance)
    if backward:
        wanted = torch.autograd.grad(expected, exact, grad.double().cpu())
        for name, got, want in zip("qkv", torch.autograd.grad(out, mine, grad), wanted):
            message = f"gradient of {name}: "
            torch.testing.assert_close(
                got.double().cpu(),
                want,
                atol=tolerance,
                rtol=tolerance,
                msg=lambda m, n=message: n + m,
            )


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}
HERE = [
    ("sdpa", "cpu", torch.float64),
    ("sdpa", "cpu", torch.float32),
    ("sdpa", "cpu", torch.bfloat16),
    ("flex", "cpu", torch.float32),  # forward only: torch has no gradient of it there
    ("sdpa", "cuda", torch.float32),
    ("sdpa", "cuda", torch.bfloat16),
    ("flex", "cuda", torch.float32),
    ("flex", "cuda", torch.bfloat16),
    ("varlen", "cuda", torch.bfloat16),
    ("flash", "cuda", torch.bfloat16),
]


def need(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Skip the test where a backend cannot run."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA GPU here")
        if note := choose_backend(backend, device, dtype, DH)[1]:
            pytest.skip(note)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("num_kv_heads", [H, 2, 1])
@pytest.mark.parametrize(("backend", "kind", "dtype"), HERE)
def test_every_backend_computes_the_same(
    backend: str, kind: str, dtype: torch.dtype, num_kv_heads: int, causal: bool
) -> None:
    """Packed rows, documents of one token and whole rows, grouped heads, one way and both ways."""
    device = torch.device(kind)
    need(backend, device, dtype)
    ids = ids_of(LENGTHS).to(device)
    mask = DocumentMask.on(backend, ids, dtype, causal)
    check_parity(
        mask, ids, num_kv_heads, TOLERANCE[dtype], backward=(backend, kind) != ("flex", "cpu")
    )


@pytest.mark.parametrize("up_to", [0, T])
def test_both_routes_of_bf16_on_a_cpu(up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two matrix products, and torch's kernel."""
    monkeypatch.setattr(attention, "EXPLICIT_UP_TO", up_to)
    ids = ids_of(LENGTHS)
    check_parity(
        DocumentMask.on("sdpa", ids, torch.bfloat16, True), ids, 2, TOLERANCE[torch.bfloat16]
    )


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    of_q: Tensor,
    of_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
) -> Tensor:
    """What the ragged kernels compute, (B T, heads, Dh) to (B T, H, Dh), and what they ask of their
    arguments."""
    assert q.ndim == k.ndim == v.ndim == 3 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert (
        of_q is of_k
        and of_q.dtype == torch.int32
        and isinstance(max_q, int)
        and max_q == max_k == int(of_q.diff().max())
    )
    numbers = torch.repeat_interleave(torch.arange(len(of_q) - 1), of_q.diff())[None]  # (1, B T)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, B T, Dh)
    return naive(q, k, v, numbers, causal)[0].transpose(0, 1).contiguous()


def flash_stand_in(*args: Any, causal: bool = False, deterministic: bool = False) -> Tensor:
    """flash_attn_varlen_func's first seven arguments, `causal` and `deterministic`, as flash-attn 2
    has them."""
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    return ragged(*args, causal=causal)


def signature_of_varlen() -> inspect.Signature:
    """Skips the test where torch has none, or the one of its first release."""
    signature = inspect.signature(pytest.importorskip("torch.nn.attention.varlen").varlen_attn)
    if "enable_gqa" not in signature.parameters:
        pytest.skip(f"varlen_attn of torch {torch.__version__} is an early one")
    return signature


def varlen_stand_in(*args: Any, **named: Any) -> Tensor:
    """varlen_attn's arguments, as the installed torch has them."""
    given = signature_of_varlen().bind(*args, **named).arguments
    assert given["enable_gqa"] == (given["query"].shape[1] != given["key"].shape[1])
    assert given["window_size"] in ((-1, 0), (-1, -1))
    return ragged(*list(given.values())[:7], causal=given["window_size"] == (-1, 0))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("num_kv_heads", [H, 2])
@pytest.mark.parametrize(
    ("backend", "stand_in"), [("varlen", varlen_stand_in), ("flash", flash_stand_in)]
)
def test_the_way_to_the_ragged_kernels_and_back(
    backend: str, stand_in: Any, num_kv_heads: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes, offsets and arguments, with a stand-in for the kernel: what can be tested of them
    without a GPU."""
    monkeypatch.setattr(attention, "_ragged_function", lambda _: stand_in)
    ids = ids_of(LENGTHS)
    check_parity(
        DocumentMask.on(backend, ids, torch.float32, causal),
        ids,
        num_kv_heads,
        TOLERANCE[torch.float32],
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize(("backend", "kind", "dtype"), HERE)
def test_no_document_sees_another(
    backend: str, kind: str, dtype: torch.dtype, causal: bool
) -> None:
    """Other keys and values in one document change nothing outside it, and something inside."""
    device = torch.device(kind)
    need(backend, device, dtype)
    ids = ids_of(LENGTHS).to(device)
    mask = DocumentMask.on(backend, ids, dtype, causal)
    (q, k, v), _ = inputs(dtype, 2, device)
    with torch.no_grad():
        before = attend(q, k, v, mask)
        for document in (0, 2):
            touched = ids == document  # (B, T)
            change = touched[:, None, :, None].to(dtype)
            after = attend(q, k + change, v - change, mask)
            same = (after == before).all(-1).all(1)  # (B, T)
            assert same[~touched].all() and not same[touched].any()


# the mask of a batch ------------------------------------------------------------------------------


def batch_of(document_ids: Tensor, packed: bool) -> Batch:
    zeros = torch.zeros_like(document_ids, dtype=torch.int64)
    return Batch(zeros, zeros, zeros, document_ids, zeros.int(), packed)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_padding_without_packing(causal: bool) -> None:
    """One document a row and padding on its right: real positions never see the padding, whichever
    way they look."""
    ids = ids_of([[T], [1, T - 1], [100, 50], [T - 1, 1]])
    mask = DocumentMask.of(batch_of(ids, packed=False), torch.float64, DH, causal=causal)
    assert (mask.bias is None) == causal  # plainly causal rows cost no mask
    (q, k, v), _ = inputs(torch.float64, 2)
    real = (ids == 0)[:, None, :, None].expand_as(q)
    torch.testing.assert_close(
        attend(q, k, v, mask)[real], naive(q, k, v, ids, causal)[real], atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("backend", ["sdpa", "flex", "varlen"])
def test_an_id_that_comes_back_is_another_document(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch promises different ids to neighbours only; a mask by equal ids alone would join
    documents 0 of 0, 1, 0."""
    monkeypatch.setattr(attention, "_ragged_function", lambda _: varlen_stand_in)
    ids = ids_of(LENGTHS) % 2
    check_parity(
        DocumentMask.on(backend, ids, torch.float32, True), ids, H, 1e-5, backward=backend != "flex"
    )


def test_queries_are_brought_to_the_dtype_of_the_mask() -> None:
    """Rotary embeddings leave fp32 queries beside bf16 values: autocast would help SDPA, and no
    other kernel."""
    (q, k, v), _ = inputs(torch.float32, H)
    mask = DocumentMask.on("sdpa", ids_of(LENGTHS), torch.bfloat16, True)
    assert torch.equal(
        attend(q, k, v.bfloat16(), mask), attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    )


# lengths ------------------------------------------------------------------------------------------

CASES = json.loads((GOLDEN / "polyglu" / "cu_seqlens_cases.json").read_text())


@pytest.mark.parametrize(
    "case", CASES["cases"], ids=lambda case: "-".join(map(str, case["cu_seqlens"]))
)
def test_lengths_of_the_original(case: dict) -> None:
    """Where PolyGLU cuts a row: after every end token, which belongs to the document before it."""
    ends = torch.tensor([case["tokens"]]) == CASES["eos_token_id"]
    offsets, longest = document_lengths((ends.cumsum(1) - ends.long()).int())
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == case["cu_seqlens"] and longest == case["max_seqlen"]


def test_a_row_always_begins_a_document() -> None:
    """Rows laid end to end: equal ids on both sides of the seam are two documents, or two pieces
    that must not meet."""
    offsets, longest = document_lengths(
        torch.tensor([[0, 0, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.int32)
    )
    assert offsets.tolist() == [0, 3, 4, 6, 9] and longest == 3


# the choice of a backend --------------------------------------------------------------------------
