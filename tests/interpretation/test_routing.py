"""The numbers of a routing: those of the published code, and those of plain loops; and what is
called noise is noise.

B batch, T time, L num_layers, F intermediate_size, K activations
"""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from core.interpretation.noise import FEWEST, intervals, shift_of
from core.interpretation.results import entropies, interpret_routing, numbers
from core.interpretation.routing import THRESHOLD, Reading, Router, static_routing
from core.models.polychromatic import PolychromaticLM
from core.models.polyglu import NAMES
from tests.interpretation.routings import ABOUT, made_up
from tests.models.test_models import make_batch
from tests.models.test_polychromatic import EXPECTED, SEEN, build


def router_of(model: PolychromaticLM) -> Router:
    layers = [block.polyglu for block in model.model_core]
    alpha, beta = (
        torch.stack([getattr(layer, name).detach() for layer in layers])
        for name in ("alpha", "beta")
    )
    return Router(alpha, beta, float(model.tau))


# the published code -------------------------------------------------------------------------------


def test_static_numbers_are_the_published_ones() -> None:
    static = static_routing(router_of(build()).alpha)
    stats, expected = static.stats(), EXPECTED["entropy_stats"]
    assert list(stats) == list(expected)
    for key, value in expected.items():
        assert stats[key] == pytest.approx(value, abs=1e-5), key
    np.testing.assert_allclose(
        static.distribution, EXPECTED["layer_distribution_percent"], atol=1e-9
    )
    found = entropies("routing_entropy", static.entropy.mean(1))
    assert found == pytest.approx(EXPECTED["routing_entropy"], abs=1e-5)


@torch.no_grad()
def test_dynamic_numbers_are_the_published_ones() -> None:
    model, reading = build(tau=0.1), Reading()
    model(make_batch(SEEN["input_ids"]))
    for row in range(len(SEEN["input_ids"])):
        reading.add(row, *router_of(model).read(model.gates[:, row], SEEN["input_ids"].shape[1], 8))
    np.testing.assert_allclose(
        model.gates[:, 0, 0], EXPECTED["gate_net_outputs_per_layer_row0_soft_tau0.1"], atol=1e-5
    )
    static = static_routing(router_of(model).alpha)
    found = interpret_routing({}, NAMES, 0.1, model.is_causal, static, {"golden": reading})
    told = numbers(found)["dynamic"]
    for key, value in EXPECTED["dynamic_routing_entropy_soft_tau0.1"].items():
        assert told[key] == pytest.approx(value, abs=1e-5), key


# plain loops --------------------------------------------------------------------------------------


def by_hand(router: Router, gates: Tensor) -> dict[str, np.ndarray]:
    """Means over tokens and neurons, one number at a time: gates (L, T, K)."""
    L, T, K = gates.shape
    F = router.alpha.shape[1]
    found = {
        "gates": np.zeros((L, K)),
        "weights": np.zeros((L, K)),
        "entropy": np.zeros(L),
        "tempered": np.zeros(L),
    }
    for i in range(L):
        for t in range(T):
            found["gates"][i] += gates[i, t].numpy() / T
            for n in range(F):
                logits = [
                    float(router.alpha[i, n, k] + router.beta[i, k] * gates[i, t, k])
                    for k in range(K)
                ]
                for key, tau in (("entropy", 1.0), ("tempered", router.tau)):
                    powers = [math.exp(logit / tau) for logit in logits]
                    p = [power / sum(powers) for power in powers]
                    found[key][i] -= sum(each * math.log(each + 1e-10) for each in p) / (T * F)
                    if key == "tempered":
                        found["weights"][i] += np.array(p) / (T * F)
    return found


def test_numbers_of_text_are_those_of_a_plain_loop() -> None:
    """Two documents of different length, one of them in two rows: every token counts the same."""
    random = torch.Generator().manual_seed(1)
    router = Router(
        torch.randn(2, 5, 4, generator=random), torch.randn(2, 4, generator=random), 0.4
    )
    rows = [
        (0, torch.randn(2, 3, 4, generator=random)),
        (1, torch.randn(2, 4, 4, generator=random)),
    ]
    rows.append((0, torch.randn(2, 2, 4, generator=random)))
    reading = Reading()
    for document, gates in rows:
        reading.add(document, *router.read(gates, gates.shape[1], 8))
    found = interpret_routing(
        {}, NAMES, router.tau, True, static_routing(router.alpha), {"a": reading}
    ).categories[0]
    everything = torch.cat([gates for _, gates in rows], dim=1)
    assert (found.documents, found.tokens) == (2, 9)
    for key, value in by_hand(router, everything).items():
        np.testing.assert_allclose(getattr(found, key).mean, value, atol=1e-6)
    np.testing.assert_allclose(found.gate_sd, everything.numpy().std(1), atol=1e-6)
    np.testing.assert_allclose(found.of_neurons.mean(1), found.entropy.mean, atol=1e-6)


def test_one_gate_for_a_row_counts_for_all_its_tokens() -> None:
    """The published pool has one f for a row, however long it is."""
    router, f = Router(torch.randn(2, 5, 4), torch.ones(2, 4), 0.5), torch.randn(2, 1, 4)
    whole, of_neurons = router.read(f.expand(2, 7, 4), 7, 3)
    one, of_neurons_one = router.read(f, 7, 3)
    for key, value in vars(whole).items():
        np.testing.assert_allclose(value, getattr(one, key), rtol=1e-5)
    np.testing.assert_allclose(of_neurons, of_neurons_one, rtol=1e-5)


def test_a_preference_needs_a_lead() -> None:
    alpha = torch.tensor(
        [[[0.0, 0.0, 0.0, 0.0], [1e-3, 0.0, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0], [0.0, 0.0, 3.0, 3.0]]]
    )
    static = static_routing(alpha)
    p = math.exp(0.1) / (math.exp(0.1) + 3)
    assert static.margin[0] == pytest.approx([0.0, 0.00025, p - (1 - p) / 3, 0.0], abs=1e-6)
    assert static.decided[0].tolist() == [False, False, True, False] and THRESHOLD == 0.01


# noise --------------------------------------------------------------------------------------------


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(3)
    held = 0
    for _ in range(100):
        tokens = random.integers(10, 60, size=30)
        low, high = intervals(tokens, (tokens * random.normal(size=30))[:, None])
        held += bool(low[0] <= 0.0 <= high[0])
    assert 85 <= held <= 100


def test_a_shift_is_called_real_when_it_is_and_seldom_else() -> None:
    """Where categories are alike, one report in twenty has a mark crossed anywhere: of ten, hardly
    more than two."""
    assert sum(made_up(layers=4, neurons=2, seed=seed).shift.real.any() for seed in range(10)) <= 2
    shifted = made_up(shift=2.0).shift
    assert (
        shifted.real.sum() > 4 and (shifted.value[shifted.real] > shifted.noise[shifted.real]).all()
    )


def test_the_shift_is_the_distance_of_the_means() -> None:
    tokens = [np.array([2, 4]), np.array([5]), np.array([1])]
    # (D, L, K): means 2, -1, 7
    gates = [np.array([[[2.0]], [[10.0]]]), np.array([[[-5.0]]]), np.array([[[7.0]]])]
    shift = shift_of(tokens, gates)
    assert (shift.value.item(), shift.highest.item(), shift.lowest.item()) == (8.0, 2, 1)
    assert shift.noise is None and not shift.real.any(), "too few texts to say more"
    assert shift_of(tokens[:1], gates[:1]) is None


def test_with_few_documents_noise_is_over_rows() -> None:
    found = made_up(documents=(12, FEWEST))
    assert found.unit == "documents" and found.categories[1].gates.low is not None
    found = made_up(documents=(12, FEWEST - 1))
    assert (
        found.unit == "rows"
        and found.categories[0].gates.low is not None
        and found.categories[1].gates.low is None
    )
    assert found.shift.noise is None


def test_numbers_are_json_and_the_same_again() -> None:
    found = made_up(documents=(6, 7, 2), causal=False)
    told = json.dumps(numbers(found), allow_nan=False)
    assert told == json.dumps(numbers(made_up(documents=(6, 7, 2), causal=False)))
    told = json.loads(told)
    assert told["causal"] is False and told["preset"] == ABOUT["preset"]
    assert [category["name"] for category in told["categories"]] == ["stdlib", "pdf", "wikipedia"]
    # (C, L, K)
    weights = np.array([category["routing_weights"]["mean"] for category in told["categories"]])
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(told["dynamic"]["routing_weights"], weights.mean(0))
    assert (
        np.shape(told["routing_shift"]["value"])
        == (3, 4)
        == np.shape(told["routing_shift"]["highest"])
    )
