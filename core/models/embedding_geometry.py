"""The geometry of a table of vectors: whether they point the same way, how many directions they
use, which are near each other.

In:    tables (V, D), one vector a row; only the direction of a row counts
Out:   numbers
State: none

A row of zeros has no direction: its cosine with every other is 0, as core.models.readout has it,
and it has drifted nowhere."""

import torch
import torch.nn.functional as F
from torch import Tensor

# V vocab_size, D hidden_size, n rows of a chunk

CHUNK_BYTES = 32 << 20
"""Of a table in float64: the only copy of it that is ever made."""


@torch.no_grad()
def mean_pairwise_cosine(table: Tensor) -> float:
    """The mean cosine between two different rows of an embedding table (V, D): 1 when it has
    collapsed to one direction."""
    unit = F.normalize(table.float(), dim=1)
    # (D,) of it: every pair, and every row with itself
    total = unit.sum(dim=0, dtype=torch.float64)
    itself = unit.square().sum(dtype=torch.float64)
    return float((total.square().sum() - itself) / max(len(table) * (len(table) - 1), 1))


@torch.no_grad()
def geometry(weight: Tensor, table: Tensor) -> dict[str, float]:
    """Measure how the prototypes, rows of `weight` (V, D), lie among themselves and against the
    rows of `table` (V, D) they began as.

    prototype_cosine       mean cosine of two different prototypes: 1 when they have collapsed to
                           one direction
    prototype_spread       standard deviation of those cosines
    prototype_dimensions   effective number of directions, 1 to min(V, D): the exponential of the
                           entropy of the eigenvalues of the mean outer product, which is the Vendi
                           score of the cosines (Friedman and Dieng, 2210.02410)
    prototype_drift        mean of 1 - cosine between a prototype and its row of `table`: 0 at the
                           beginning, 1 at right angles

    Nothing (V, V) is made: the squares of all cosines add up to those of the (D, D) Gram matrix.
    """
    size, width = weight.shape
    gram = weight.new_zeros(width, width, dtype=torch.float64)
    total = weight.new_zeros(width, dtype=torch.float64)
    directed, drift, compared = (weight.new_zeros((), dtype=torch.float64) for _ in range(3))
    rows = max(1, CHUNK_BYTES // (8 * width))
    for start in range(0, size, rows):
        unit, before = (_unit(each[start : start + rows]) for each in (weight, table))  # (n, D)
        gram.addmm_(unit.T, unit)
        total += unit.sum(dim=0)
        here = unit.any(dim=1)  # (n,)
        both = here & before.any(dim=1)
        directed += here.sum()
        drift += (1 - (unit * before).sum(dim=1)[both]).sum()
        compared += both.sum()
    pairs = max(size * (size - 1), 1)
    # every row with itself is 1, and is no pair
    mean = (total.square().sum() - directed) / pairs
    spread = ((gram.square().sum() - directed) / pairs - mean.square()).clamp(min=0).sqrt()
    # (D,), they add up to 1
    shares = torch.linalg.eigvalsh(gram).clamp(min=0) / directed.clamp(min=1)
    numbers = {
        "prototype_cosine": mean,
        "prototype_spread": spread,
        "prototype_dimensions": torch.special.entr(shares).sum().exp(),
        "prototype_drift": drift / compared.clamp(min=1),
    }
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist()))


@torch.no_grad()
def nearest(table: Tensor, index: int, k: int) -> list[tuple[int, float]]:
    """The `k` other rows of `table` (V, D) with the highest cosine to row `index`, the nearest
    first: (row, cosine).

    Fewer where there are no more; of equally near ones the lower row is first.
    """
    one = F.normalize(table[index].float(), dim=0)  # (D,)
    # (V,)
    cosine = (table.float() @ one) / torch.linalg.vector_norm(
        table, dim=1, dtype=torch.float32
    ).clamp(min=1e-12)
    cosine[index] = -torch.inf
    best = cosine.sort(descending=True, stable=True)
    k = min(k, len(table) - 1)
    return list(zip(best.indices[:k].tolist(), best.values[:k].tolist()))


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.double(), dim=1)
