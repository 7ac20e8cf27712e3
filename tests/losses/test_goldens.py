"""Values and gradients of the specifications' losses against numbers computed independently
(tests/golden)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core.contracts import Batch, ModelOutput
from core.losses.base import Chunk
from core.losses.harmonic import EPS
from core.losses.stack import LossStack
from core.models.readout import DistanceReadout, LinearReadout
from tests.losses.setup import make_batch
from tests.losses.test_losses import build

GOLDEN = Path(__file__).parent.parent / "golden"


def golden(name: str) -> tuple[dict, dict[str, Tensor]]:
    folder = GOLDEN / name
    return json.loads((folder / "expected.json").read_text()), load_file(folder / "io.safetensors")


class Given:
    """A readout whose logits are the hidden states: goldens give logits, not what they come
    from."""

    provides, linear = "logits", None

    def __init__(self, table: Tensor):
        self.table = table

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden

    def parameters(self) -> list[Tensor]:
        return []


def run(losses: list, logits: Tensor, labels: Tensor, table: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The mean over targets, and its gradients by logits and table."""
    logits, table = logits.clone().requires_grad_(), table.clone().requires_grad_()
    stack, batch = LossStack(losses, 5, 2), make_batch(labels)
    total, _ = stack(ModelOutput(logits, Given(table)), batch, stack.count(batch), 0.0, 2)
    found = torch.autograd.grad(total, [logits, table], allow_unused=True)
    return total.detach(), [
        torch.zeros_like(of) if g is None else g for g, of in zip(found, (logits, table))
    ]


# cosine: golden labels are input ids, the target of position t stands at t + 1 --------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@pytest.mark.parametrize("topk", [None, 1, 5, 50])
def test_cosine(topk: int | None, temperature: float, dtype: torch.dtype, tolerance: float) -> None:
    expected, io = golden("cosine")
    logits, labels, table = (
        io["logits"][:, :-1].to(dtype),
        io["labels"][:, 1:],
        io["embed"].to(dtype),
    )
    loss = build("cosine", topk=topk, temperature=temperature)
    key = f"T{temperature:g}_topk{topk}"
    total, (by_logits, by_table) = run([loss], logits, labels, table)
    assert abs(float(total) - expected["cos"][key]) <= tolerance
    if f"grad_logits_{key}" in io:
        assert float((by_logits - io[f"grad_logits_{key}"][:, :-1]).abs().max()) <= tolerance
        assert float((by_table - io[f"grad_embed_{key}"]).abs().max()) <= tolerance
    if f"per_token_{key}" in io:
        keep = labels != -100
        chunk = Chunk(logits[keep], labels[keep], table, 0.0)
        assert (
            float((loss.per_token(chunk) - io[f"per_token_{key}"][keep]).abs().max()) <= tolerance
        )


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 0.75, 1])
def test_mixed_with_cross_entropy(alpha: float) -> None:
    expected, io = golden("cosine")
    losses = [build("cosine", weight=alpha), build("cross_entropy", weight=1 - alpha)]
    total, _ = run(losses, io["logits"][:, :-1], io["labels"][:, 1:], io["embed"])
    assert abs(float(total) - expected["mixed"][f"alpha{alpha:g}_T1"]) <= 1e-12


# sharpness ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("penalty", ["non_max_sum", "neg_entropy", "neg_max_prob", "top_k_mass"])
def test_sharpness(penalty: str, dtype: torch.dtype, tolerance: float) -> None:
    """The golden entropy has log(p + 1e-10), which is 2e-9 off the entropy; the exact one is a
    number of its own."""
    expected, io = golden("sharpness")
    logits, loss = io["logits"][:, :-1].to(dtype), build("sharpness", penalty=penalty, weight=1.0)
    labels = torch.zeros(logits.shape[:2], dtype=torch.int64)
    total, (by_logits, _) = run([loss], logits, labels, torch.zeros(20, 4, dtype=dtype))
    value = expected["penalty_positions_0_to_N-2_inclusive_ie_slice_[:-1]"][penalty]
    exact = dtype == torch.float64 and penalty != "neg_entropy"
    assert abs(
        float(total) - (expected["entropy_exact_no_eps"] if penalty == "neg_entropy" else value)
    ) <= (1e-12 if dtype == torch.float64 else tolerance)
    assert float((by_logits - io[f"grad_{penalty}"][:, :-1]).abs().max()) <= (
        1e-12 if exact else tolerance
    )
    assert not io[f"grad_{penalty}"][:, -1].any()  # nothing pulls at a position without a target
    per_position = loss.per_token(
        Chunk(logits.flatten(0, 1), labels.flatten(), torch.zeros(20, 4, dtype=dtype), 0.0)
    )
    close = 1e-12 if exact else max(tolerance, 1e-8)
    assert float((per_position - io[f"per_position_{penalty}"].flatten()).abs().max()) <= close


@pytest.mark.parametrize("penalty", ["non_max_sum", "neg_entropy", "neg_max_prob", "top_k_mass"])
def test_positions_without_a_target_are_left_out(penalty: str) -> None:
    expected, io = golden("sharpness")
    labels = torch.where(io["position_mask"].bool(), 0, -100)
    loss = build("sharpness", penalty=penalty, weight=1.0)
    total, _ = run([loss], io["logits"][:, :-1], labels, torch.zeros(20, 4, dtype=torch.float64))
    assert abs(float(total) - expected["masked_mean_variant"][penalty]) <= (
        1e-8 if penalty == "neg_entropy" else 1e-12
    )


@pytest.mark.parametrize("penalty", ["non_max_sum", "neg_entropy", "neg_max_prob", "top_k_mass"])
def test_limits_and_sign(penalty: str) -> None:
    """Uniform, one-hot, and that sharper logits cost less. (1e-10 in the golden's logarithm is 2e-9
    of its entropy.)"""
    expected, _ = golden("sharpness")
    loss = build("sharpness", penalty=penalty)
    table, labels = torch.zeros(20, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)

    def value(logits: Tensor) -> float:
        return float(loss.per_token(Chunk(logits, labels, table, 0.0)))

    one_hot = torch.full((1, 20), -1000.0, dtype=torch.float64)
    one_hot[0, 3] = 1000.0
    assert (
        abs(value(torch.zeros(1, 20, dtype=torch.float64)) - expected["uniform_V20"][penalty])
        <= 3e-9
    )
    assert abs(value(one_hot) - expected["one_hot"][penalty]) <= 1e-9
    logits = torch.randn(1, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    costs = [value(logits * sharper) for sharper in (0.5, 1, 2, 4)]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1] + 0.1


# harmonic -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("h_exp", [-12, -10, -8, -6, -4, -1])
@pytest.mark.parametrize("name, distance", [("sq", "squared"), ("euclid", "euclidean")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_harmonic(name: str, distance: str, h_exp: int, dtype: torch.dtype) -> None:
    expected, io = golden("harmonic")
    hidden, prototypes = (
        io[key].to(dtype).clone().requires_grad_() for key in ("hidden", "prototypes")
    )
    loss = build("harmonic", h_exp=float(h_exp), distance=distance)
    batch = make_batch(io["targets"][None])
    output = ModelOutput(hidden[None], DistanceReadout(prototypes))
    total, terms = LossStack([loss], 4, 2)(output, batch, 6, 0.0, 2)
    wanted = torch.tensor(expected["losses"][f"{name}_h{h_exp}"]["per_token"], dtype=dtype)
    exact = dtype == torch.float64
    assert float((terms.values[0] - wanted).abs().max()) <= (1e-10 if exact else 1e-3)
    assert abs(float(total.detach()) - expected["losses"][f"{name}_h{h_exp}"]["mean"]) <= (
        1e-10 if exact else 1e-3
    )
    found = torch.autograd.grad(total, [hidden, prototypes])
    assert all(g.isfinite().all() for g in found)
    if exact and f"grad_hidden_{name}_h{h_exp}" in io:
        assert float((found[0] - io[f"grad_hidden_{name}_h{h_exp}"]).abs().max()) <= 1e-10
        assert float((found[1] - io[f"grad_prototypes_{name}_h{h_exp}"]).abs().max()) <= 1e-10
    measured = LossStack([loss], 4, 2).measure(output, batch, 0.0, 2)
    assert (
        int(measured.token_stats["token_accuracy"]) / 6
        == expected["losses"][f"{name}_h{h_exp}"]["top1_acc"]
    )
    assert int(measured.token_stats["top5_accuracy"]) == int(
        (io["cosine"].topk(5).indices == io["targets"][:, None]).sum()
    )
    # at its own exponents, whatever the schedule's is
    for fact, fixed in (("nll_h12", -12), ("nll_h4", -4)):
        wanted = 6 * expected["losses"][f"{name}_h{fixed}"]["mean"]
        assert abs(float(measured.token_stats[fact]) - wanted) <= (1e-9 if exact else 6e-3)
    assert "cross_entropy" not in measured.token_stats


def test_distances() -> None:
    _, io = golden("harmonic")
    readout = DistanceReadout(io["prototypes"])
    assert float((readout(io["hidden"]) - io["dist_sq"]).abs().max()) <= 1e-12


@pytest.mark.parametrize(
    "case", json.loads((GOLDEN / "harmonic" / "expected.json").read_text())["edge_cases"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_harmonic_edges(case: str, dtype: torch.dtype) -> None:
    """A hidden state that is a prototype, a row of zeros: finite, where the formula as written is
    NaN in fp32."""
    edge, exact = (
        golden("harmonic")[0]["edge_cases"][case],
        1e-10 if dtype == torch.float64 else 1e-3,
    )
    hidden = torch.tensor(edge["hidden"], dtype=dtype).reshape(1, 1, -1).requires_grad_()
    prototypes = torch.tensor(edge["prototypes"], dtype=dtype).requires_grad_()
    for key, wanted in edge["nll"].items():
        name, _, h_exp = key.partition("_h")
        if name not in ("sq", "euclid"):
            continue
        loss = build(
            "harmonic", h_exp=float(h_exp), distance={"sq": "squared", "euclid": "euclidean"}[name]
        )
        output = ModelOutput(hidden, DistanceReadout(prototypes))
        total, _ = LossStack([loss])(
            output, make_batch(torch.tensor([[edge["target"]]])), 1, 0.0, 2
        )
        assert float(total.detach()) == pytest.approx(wanted, rel=exact, abs=min(exact, 1e-6))
        assert all(g.isfinite().all() for g in torch.autograd.grad(total, [hidden, prototypes]))
    assert EPS == 1e-8


def test_the_plain_formula_is_what_the_log_domain_avoids() -> None:
    """Why it is written as it is: in fp32 the golden inputs make the formula NaN at -12."""
    _, io = golden("harmonic")
    d2 = io["dist_sq"].float() + EPS
    p = d2**-12.0
    assert (p / p.sum(dim=1, keepdim=True)).isnan().any()


# tied to a linear readout -------------------------------------------------------------------------


def test_cosine_through_a_tied_readout_is_autograds() -> None:
    """The table is readout, mean and target at once: one buffer takes all three gradients."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(2, 7, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(50, (2, 7), generator=generator)
    stack = LossStack([build("cosine")], 5, 2)
    total, _ = stack(ModelOutput(hidden, LinearReadout(weight)), make_batch(labels), 14, 0.0, 2)
    p = (hidden @ weight.T).softmax(-1)
    plain = (1 - torch.cosine_similarity(p @ weight, weight[labels], dim=-1)).mean()
    for a, b in zip(
        torch.autograd.grad(total, [hidden, weight]), torch.autograd.grad(plain, [hidden, weight])
    ):
        assert float((a - b).abs().max()) <= 1e-12


# through a whole model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2() -> tuple[torch.nn.Module, Batch]:
    """The golden GPT-2 and its batch: labels there are the input ids, here the target of each
    position."""
    from core.models.gpt2 import GPT2, GPT2Settings

    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "seq_length": 24}
    model = GPT2(GPT2Settings(**sizes), 67)
    model.load_state_dict(load_file(GOLDEN / "gpt2_tiny" / "state_dict.safetensors"))
    io = load_file(GOLDEN / "gpt2_tiny" / "io.safetensors")
    labels = torch.cat([io["labels"][:, 1:], torch.full((2, 1), -100)], dim=1)
    zeros = torch.zeros_like(labels)
    positions = torch.arange(12).expand(2, 12)
    return model, Batch(io["input_ids"], labels, positions, zeros.int(), zeros.int(), packed=False)


def every_position(batch: Batch) -> Batch:
    """A target wherever specification 004 has a penalty: at [:-1], labels of -100 included.
    Penalties do not read it."""
    labels = torch.zeros_like(batch.labels)
    labels[:, -1] = -100
    return replace(batch, labels=labels)


@pytest.mark.parametrize(
    "mix, parts",
    [
        ("penalty0.1_non_max_sum", ("sharpness", 1.0, 0.1)),
        ("cosine_alpha0.5_T1", ("cosine", 0.5, 0.5)),
    ],
)
def test_gradients_of_a_model(
    mix: str, parts: tuple[str, float, float], gpt2: tuple[torch.nn.Module, Batch]
) -> None:
    model, batch = gpt2
    kind, of_cross_entropy, weight = parts
    expected = json.loads((GOLDEN / "gpt2_tiny" / "expected.json").read_text())
    other_batch = every_position(batch) if kind == "sharpness" else batch
    model.zero_grad()
    output = model(batch)
    losses = [
        (build("cross_entropy", weight=of_cross_entropy), batch),
        (build(kind, weight=weight), other_batch),
    ]
    totals = []
    for loss, seen in losses:
        stack = LossStack([loss], 5, 2)
        totals.append(stack(output, seen, stack.count(seen), 0.0, 2)[0])
    sum(totals).backward()
    assert abs(float(sum(totals).detach()) - expected[f"loss_{mix}"]) <= 1e-5
    assert abs(float(totals[0].detach()) / of_cross_entropy - expected["ce_numpy_f64"]) <= 1e-5
    wanted = load_file(GOLDEN / "gpt2_tiny" / f"grads_{mix}.safetensors")
    found = {name: p.grad for name, p in model.named_parameters()}
    assert set(found) == set(wanted)
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) <= 1e-5
    norm = torch.nn.utils.get_total_norm(found.values())
    assert float(norm) == pytest.approx(expected[f"gradnorm_{mix}"], abs=1e-4)


def test_a_detached_table_gets_the_readouts_gradient_only(
    gpt2: tuple[torch.nn.Module, Batch],
) -> None:
    model, batch = gpt2
    expected = json.loads((GOLDEN / "gpt2_tiny" / "expected.json").read_text())
    stack = LossStack(
        [build("cross_entropy", weight=0.5), build("cosine", weight=0.5, detach_table=True)]
    )
    model.zero_grad()
    stack(model(batch), batch, stack.count(batch), 0.0, 2)[0].backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert float(norm) == pytest.approx(
        expected["gradnorm_cosine_alpha0.5_T1_E_detached"], abs=1e-4
    )


@pytest.mark.parametrize("penalty", ["non_max_sum", "neg_entropy", "neg_max_prob", "top_k_mass"])
def test_penalties_of_a_model(penalty: str, gpt2: tuple[torch.nn.Module, Batch]) -> None:
    model, batch = gpt2
    expected = json.loads((GOLDEN / "gpt2_tiny" / "expected.json").read_text())
    batch = every_position(batch)
    measured = LossStack([build("sharpness", penalty=penalty)]).measure(model(batch), batch, 0.0, 2)
    mean = float(measured.terms.sums["sharpness"] / measured.terms.count)
    assert mean == pytest.approx(expected[f"penalty_{penalty}"], abs=1e-5)
