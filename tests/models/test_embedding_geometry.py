"""How vectors lie: against the definitions, pair by pair in float64, and where rows are alike, at
right angles, zero or alone."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import core.models.embedding_geometry
from core.models.embedding_geometry import geometry, mean_pairwise_cosine, nearest


def random(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    sizes = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b)) / sizes if sizes else 0.0


def by_hand(weight: Tensor, table: Tensor) -> dict[str, float]:
    """Pair by pair; the directions by the eigenvalues of the (V, V) matrix of cosines, which the
    program never makes."""
    rows, before = weight.double().numpy(), table.double().numpy()
    size = len(rows)
    pairs = [cosine(rows[i], rows[j]) for i in range(size) for j in range(size) if i != j]
    mean = sum(pairs) / max(len(pairs), 1)
    everything = np.array([[cosine(a, b) for b in rows] for a in rows])
    shares = [
        value / np.trace(everything) for value in np.linalg.eigvalsh(everything) if value > 1e-12
    ]
    moved = [1 - cosine(a, b) for a, b in zip(rows, before) if a.any() and b.any()]
    return {
        "prototype_cosine": mean,
        "prototype_spread": math.sqrt(
            sum((each - mean) ** 2 for each in pairs) / max(len(pairs), 1)
        ),
        "prototype_dimensions": math.exp(-sum(share * math.log(share) for share in shares)),
        "prototype_drift": sum(moved) / len(moved),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(23, 7), (5, 12), (2, 3), (1, 4)])
def test_geometry_equals_its_definitions(
    monkeypatch: pytest.MonkeyPatch, rows: int, width: int, dtype: torch.dtype
) -> None:
    """Whatever the lengths of rows, and cut into chunks that do not come out even."""
    monkeypatch.setattr(core.models.embedding_geometry, "CHUNK_BYTES", 4 * 8 * width)
    weight = (random(rows, width) * torch.logspace(-3, 3, rows)[:, None] + 0.1).to(dtype)
    table = random(rows, width, seed=1).to(dtype)
    found = geometry(weight, table)
    assert found == pytest.approx(by_hand(weight, table), rel=1e-9, abs=1e-9)
    assert found["prototype_cosine"] == pytest.approx(mean_pairwise_cosine(weight), abs=1e-6)


def test_rows_of_zeros_are_finite_and_have_drifted_nowhere() -> None:
    """In the prototypes, in the table, in both; and a table of nothing else."""
    weight, table = random(9, 4), random(9, 4, seed=1)
    weight[[0, 3]] = 0
    table[[0, 5]] = 0
    assert geometry(weight, table) == pytest.approx(by_hand(weight, table), rel=1e-9, abs=1e-9)
    nothing = torch.zeros(3, 4)
    assert geometry(nothing, nothing) == {
        "prototype_cosine": 0.0,
        "prototype_spread": 0.0,
        "prototype_dimensions": 1.0,
        "prototype_drift": 0.0,
    }
    assert mean_pairwise_cosine(nothing) == 0.0
    assert nearest(nothing, 1, 5) == [(0, 0.0), (2, 0.0)]


def test_a_collapsed_table_has_one_direction() -> None:
    weight = random(1, 8).expand(50, 8) * torch.linspace(0.1, 9, 50)[:, None]
    expected = {
        "prototype_cosine": 1.0,
        "prototype_spread": 0.0,
        "prototype_dimensions": 1.0,
        "prototype_drift": 0.0,
    }
    assert geometry(weight, weight) == pytest.approx(expected, abs=1e-6)
    assert mean_pairwise_cosine(weight) == pytest.approx(1.0)


def test_rows_at_right_angles_have_as_many_directions_as_rows() -> None:
    weight, _ = torch.linalg.qr(random(8, 8).double())
    found = geometry(weight[:5], weight[3:])  # each row is compared with another one
    expected = {
        "prototype_cosine": 0.0,
        "prototype_spread": 0.0,
        "prototype_dimensions": 5.0,
        "prototype_drift": 1.0,
    }
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_row_alone_is_no_pair() -> None:
    weight = torch.tensor([[3.0, 4.0]])
    found = geometry(weight, -weight)
    assert found == pytest.approx(
        {
            "prototype_cosine": 0.0,
            "prototype_spread": 0.0,
            "prototype_dimensions": 1.0,
            "prototype_drift": 2.0,
        },
        abs=1e-6,
    )
    assert (
        mean_pairwise_cosine(weight) == pytest.approx(0.0, abs=1e-6) and nearest(weight, 0, 3) == []
    )


def test_a_copy_has_not_drifted() -> None:
    """Also where each of its rows was scaled to length one in float32, as the prototypes are after
    each update."""
    table = random(300, 64)
    found = geometry(torch.nn.functional.normalize(table, dim=1), table)
    assert 0 <= abs(found["prototype_drift"]) < 1e-12


def test_the_nearest_are_the_nearest() -> None:
    table = random(40, 6) * torch.logspace(-2, 2, 40)[:, None]
    rows = table.double().numpy()
    for index in (0, 17, 39):
        expected = sorted(
            ((cosine(rows[index], row), i) for i, row in enumerate(rows) if i != index),
            reverse=True,
        )
        found = nearest(table, index, 5)
        assert [i for i, _ in found] == [i for _, i in expected[:5]]
        assert [value for _, value in found] == pytest.approx(
            [value for value, _ in expected[:5]], abs=1e-6
        )
    assert len(nearest(table, 3, 100)) == 39 and nearest(table, 3, 0) == []
    assert nearest(table.bfloat16(), 3, 1)[0][0] == nearest(table, 3, 1)[0][0]
