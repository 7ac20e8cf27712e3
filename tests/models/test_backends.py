"""The choice of an attention backend, and models that use one."""

import re
import sys
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from core.contracts import Batch
from core.models import attention
from core.models.attention import DocumentMask, choose_backend
from core.models.simple_lm import SimpleLM, SimpleLMSettings
from tests.models.test_attention import (
    CPU,
    DH,
    GPU,
    HERE,
    LENGTHS,
    T,
    batch_of,
    ids_of,
    need,
    signature_of_varlen,
)


def test_sdpa_is_the_default_everywhere() -> None:
    for device in (CPU, GPU):
        assert (
            choose_backend("auto", device, torch.bfloat16, 64)
            == choose_backend("sdpa", device, torch.float32, 7)
            == ("sdpa", None)
        )
    assert SimpleLMSettings().attention == "auto"
    with pytest.raises(ValidationError, match="attention"):
        SimpleLMSettings(attention="flash3")


@pytest.mark.parametrize(
    ("wish", "name"),
    [("flex", "FlexAttention"), ("varlen", "torch's varlen_attn"), ("flash", "flash-attn")],
)
def test_without_a_gpu_sdpa_takes_over_and_says_so(wish: str, name: str) -> None:
    backend, note = choose_backend(wish, CPU, torch.bfloat16, 64)
    assert backend == "sdpa"
    assert (
        note == f'attention "{wish}": {name} trains on CUDA GPUs only, and this is a CPU; torch\'s '
        "SDPA is used instead"
    )


@pytest.mark.parametrize(
    ("wish", "gone", "dtype", "head_dim", "reason"),
    [
        (
            "flash",
            "flash_attn",
            torch.bfloat16,
            64,
            "the package flash-attn cannot be imported .*pip install flash-attn",
        ),
        (
            "varlen",
            "torch.nn.attention.varlen",
            torch.bfloat16,
            64,
            "torch .* has no torch.nn.attention.varlen",
        ),
        (
            "varlen",
            None,
            torch.float32,
            64,
            "torch's varlen_attn computes in bf16 or fp16, and this run in float32",
        ),
        (
            "varlen",
            None,
            torch.bfloat16,
            20,
            "a head width that is a multiple of 8 up to 256, these are 20 wide",
        ),
    ],
)
def test_on_a_gpu_too_it_says_what_is_missing(
    wish: str,
    gone: str | None,
    dtype: torch.dtype,
    head_dim: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if gone:
        monkeypatch.setitem(sys.modules, gone, None)  # an import of it fails
    else:
        signature_of_varlen()
    backend, note = choose_backend(wish, GPU, dtype, head_dim)
    assert backend == "sdpa"
    assert re.fullmatch(
        f'attention "{wish}": .*{reason}.*; torch\'s SDPA is used instead', note or ""
    )


# the model ----------------------------------------------------------------------------------------


def model_and_batch(wish: str, device: torch.device = CPU) -> tuple[SimpleLM, Batch]:
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 64,
        "seq_length": T,
    }
    model = SimpleLM(SimpleLMSettings(**sizes, attention=wish), 40).to(device)
    batch = batch_of(ids_of(LENGTHS), packed=True)
    batch.input_ids = torch.randint(
        0, 40, (len(LENGTHS), T), generator=torch.Generator().manual_seed(2)
    )
    batch.position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    return model, batch.to(device)


def run_model(model: Any, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(hidden states, gradient of the first layer's projection)."""
    with torch.autocast(
        batch.input_ids.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16
    ):
        hidden = model(batch).hidden
    hidden.float().square().sum().backward()
    return hidden.detach().float(), model.layers[0].self_attn.in_proj_weight.grad


@pytest.mark.parametrize(
    ("wish", "kind", "dtype"),
    [
        ("flex", "cpu", torch.float32),
        ("varlen", "cpu", torch.bfloat16),
        ("flash", "cpu", torch.bfloat16),
    ]
    + [case for case in HERE if case[1] == "cuda" and case[0] != "sdpa"],
)
def test_a_model_is_the_same_whatever_computes_its_attention(
    wish: str, kind: str, dtype: torch.dtype
) -> None:
    """Hidden states and gradients; where a backend cannot run, SDPA does instead and the model says
    so."""
    device = torch.device(kind)
    need(wish, device, dtype)
    (plain, batch), (other, _) = model_and_batch("sdpa", device), model_and_batch(wish, device)
    assert plain.state_dict().keys() == other.state_dict().keys()
    assert plain.attention_note(device, dtype) is None and (
        other.attention_note(device, dtype) is None
    ) == (kind == "cuda")
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    for got, want in zip(run_model(other, batch, dtype), run_model(plain, batch, dtype)):
        torch.testing.assert_close(got, want, atol=tolerance * float(want.abs().max()), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wish", "kind"),
    [("auto", "cpu"), ("flex", "cpu"), ("auto", "cuda"), ("flex", "cuda"), ("varlen", "cuda")],
)
def test_models_compile(wish: str, kind: str) -> None:
    """In one graph, unless the number of documents must be known; and what is compiled computes the
    same."""
    device, dtype = torch.device(kind), torch.bfloat16 if wish == "varlen" else torch.float32
    need(wish, device, dtype)
    model, batch = model_and_batch(wish, device)
    hidden, grad = run_model(model, batch, dtype)
    model.zero_grad()
    compiled = torch.compile(
        model, backend="aot_eager" if kind == "cpu" else "inductor", fullgraph=wish != "varlen"
    )
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    for got, want in zip(run_model(compiled, batch, dtype), (hidden, grad)):
        torch.testing.assert_close(got, want, atol=tolerance * float(want.abs().max()), rtol=0)


def test_evaluation_does_not_use_eager_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation runs uncompiled; FlexAttention would write out every head's scores there."""
    monkeypatch.setattr(attention, "choose_backend", lambda *_: ("flex", None))
    batch = batch_of(ids_of(LENGTHS), packed=True)
    assert DocumentMask.of(batch, torch.float32, DH, "flex").backend == "flex"
    with torch.no_grad():
        assert DocumentMask.of(batch, torch.float32, DH, "flex").backend == "sdpa"


def test_the_mark_of_a_constant_result_is_torchs() -> None:
    """It is set by hand, so that importing the models does not import the compiler."""
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked) == vars(attention._obstacle) == {"_dynamo_marked_constant": True}
