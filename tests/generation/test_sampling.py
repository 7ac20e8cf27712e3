"""Nucleus sampling: the smallest set of tokens that reaches top_p, drawn from in its shares."""

from collections import Counter

import pytest
import torch

from core.generation.sampling import NUCLEUS_TOP_K, sample_top_p

PROBABILITIES = [0.5, 0.3, 0.12, 0.05, 0.03]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 5)]
)
def test_the_nucleus_keeps_the_token_that_crosses(top_p: float, kept: int) -> None:
    """The smallest set that reaches top_p (Holtzman et al. 2020), drawn from in exactly its
    renormalised shares."""
    logits = torch.tensor(PROBABILITIES, dtype=torch.float64).log()[[3, 0, 4, 2, 1]]  # in no order
    order = [1, 4, 3, 0, 2]  # places of the probabilities above, best first
    random, n = torch.Generator().manual_seed(0), 4000
    drawn = Counter(sample_top_p(logits, top_p, random) for _ in range(n))
    exact = [p / sum(PROBABILITIES[:kept]) for p in PROBABILITIES[:kept]]
    assert set(drawn) <= set(order[:kept])
    chi2 = sum((drawn[token] - n * p) ** 2 / (n * p) for token, p in zip(order, exact))
    # 4 degrees of freedom: chance passes this once in twenty thousand, and the seed is fixed
    assert chi2 < 25.0


def test_the_best_token_is_always_kept() -> None:
    random = torch.Generator().manual_seed(0)
    assert {sample_top_p(torch.tensor([0.0, 5.0, 1.0]), 1e-6, random) for _ in range(50)} == {1}


@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
def test_looking_at_a_few_tokens_first_changes_no_draw(top_p: float) -> None:
    """A vocabulary larger than that, flat or peaked: only tokens of the nucleus, in their
    shares."""
    for spread in (0.1, 3.0, 8.0):
        logits = spread * torch.randn(4 * NUCLEUS_TOP_K, generator=torch.Generator().manual_seed(1))
        probabilities, order = torch.softmax(logits, -1).sort(descending=True)
        nucleus = set(order[probabilities.cumsum(-1) - probabilities < top_p + 1e-5].tolist())
        random = torch.Generator().manual_seed(2)
        drawn = Counter(sample_top_p(logits, top_p, random) for _ in range(500))
        assert set(drawn) <= nucleus
        expected = float(probabilities[0]) / min(top_p, float(probabilities.cumsum(-1)[-1]))
        assert drawn[int(order[0])] / 500 == pytest.approx(min(expected, 1.0), abs=0.1)
