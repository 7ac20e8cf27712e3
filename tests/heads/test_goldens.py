"""The heads against numbers computed for this project from the specification's text, on the
original's own model and weights.

`recommended`: at given positions, with targets that come after them. `as_coded`: the original's,
where its arithmetic is ours."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts import IGNORE_INDEX, Batch
from core.heads import AuxiliarySettings
from core.heads.dynamics import ROLLOUT, Dynamics
from core.heads.inputs import HeadInputs
from core.heads.policy import Policy, divergence
from core.heads.span_contrastive import info_nce, mean_over
from core.heads.value import Value, coming_nll
from core.models.readout import LinearReadout

FOLDER = Path(__file__).resolve().parent.parent / "golden" / "muzero"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
NOW = EXPECTED["recommended"]
SETTINGS = AuxiliarySettings(value_span_tokens=NOW["value_window"])
D, V = EXPECTED["config"]["hidden_size"], EXPECTED["config"]["vocab_size"]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """In float64, as the numbers were computed."""
    files = load_file(FOLDER / "io.safetensors") | load_file(FOLDER / "state_dict.safetensors")
    return {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in files.items()
    }


def inputs_of(tensors: dict[str, Tensor]) -> HeadInputs:
    """The original's hidden states of three rows, the last of which ends in padding."""
    ids = tensors["input_ids"]
    text = ids != EXPECTED["pad_token_id"]
    labels = F.pad(ids, (0, 1), value=EXPECTED["pad_token_id"])[:, 1:]
    labels = labels.masked_fill(labels == EXPECTED["pad_token_id"], IGNORE_INDEX)
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    batch = Batch(
        ids, labels, positions, (~text).int(), torch.where(text, 0, -1).int(), packed=False
    )
    nll = F.cross_entropy(
        tensors["logits"].transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none"
    )
    readout = LinearReadout(
        tensors["lm_head.weight"], tensors["lm_head.bias"], tensors["embedding.weight"]
    )
    return HeadInputs(
        tensors["hidden"], readout, batch, lambda at: nll.gather(1, at), torch.float64
    )


def loaded(head: nn.Module, tensors: dict[str, Tensor], prefix: str) -> Any:
    head.double().load_state_dict(
        {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, strict=True
    )
    return head


def loss_of(head: Any, tensors: dict[str, Tensor]) -> float:
    positions = torch.tensor(NOW["positions"])[:, None]
    return head(inputs_of(tensors), positions, torch.ones(3, dtype=torch.bool)).mean().item()


def test_policy(tensors: dict[str, Tensor]) -> None:
    head = loaded(Policy(SETTINGS, D, V), tensors, "policy_head.")
    assert loss_of(head, tensors) == pytest.approx(NOW["policy_kl"], abs=1e-4)


def test_value(tensors: dict[str, Tensor]) -> None:
    """Targets and error."""
    positions = torch.tensor(NOW["positions"])[:, None]
    targets = coming_nll(inputs_of(tensors), positions, NOW["value_window"])[:, 0]
    assert targets.tolist() == pytest.approx(NOW["value_targets"], abs=1e-4)
    head = loaded(Value(SETTINGS, D, V), tensors, "value_head.")
    assert loss_of(head, tensors) == pytest.approx(NOW["value_mse"], abs=1e-4)


def test_dynamics(tensors: dict[str, Tensor]) -> None:
    assert NOW["dynamics_rollout"] == ROLLOUT
    head = loaded(Dynamics(SETTINGS, D, V), tensors, "dynamics_fc.")
    assert loss_of(head, tensors) == pytest.approx(NOW["dynamics_mse"], abs=1e-4)


def test_the_divergence_is_the_originals(tensors: dict[str, Tensor]) -> None:
    """At the original's place, the last position, and from its own scores."""
    teacher = tensors["logits"][:, -1].log_softmax(-1)
    values = divergence(teacher, tensors["aux_policy_logits"].log_softmax(-1))
    assert values.mean().item() == pytest.approx(EXPECTED["as_coded"]["policy_kl"], abs=1e-4)


def test_info_nce_is_the_originals(tensors: dict[str, Tensor]) -> None:
    """From the original's query, which has the span's positions at zero and divides by the row's
    length."""
    time, start = torch.arange(tensors["hidden"].shape[1]), tensors["span_start"][:, None]
    span = (time >= start) & (time < start + EXPECTED["as_coded"]["span_len"])  # (3, T)
    query = tensors["aux_span_proj"].masked_fill(span[:, :, None], 0.0).mean(1)
    key = mean_over(tensors["aux_span_proj"], span)
    values = info_nce(
        query, key, torch.ones(3, dtype=torch.bool), temperature=0.07, l2_normalize=True
    )
    assert values.mean().item() == pytest.approx(EXPECTED["as_coded"]["span_infonce"], abs=1e-4)
