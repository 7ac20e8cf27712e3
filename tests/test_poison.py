"""The poison mode of tests/poison: memory that nobody wrote shows, in every process; a kernel that
would read it is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
POISON = ROOT / "tests" / "poison"


def poisoned(code: str) -> subprocess.CompletedProcess:
    """A Python of its own in the mode."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(POISON), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )


def test_this_run_is_poisoned_where_that_was_asked_for() -> None:
    """Python passes over a sitecustomize.py that fails, with a line on stderr; and where nobody
    asked, the mode is off."""
    asked = str(POISON) in os.environ.get("PYTHONPATH", "").split(os.pathsep)
    assert torch.are_deterministic_algorithms_enabled() == asked
    assert (np.empty.__module__ == "sitecustomize") == asked
    assert not asked or torch.empty(3).isnan().all()


SEEN = """
import subprocess, sys
import numpy as np, torch

new, like = lambda n: torch.ones(2).new_empty(n), lambda n: torch.empty_like(torch.ones(n))
for allocate in (torch.empty, np.empty, new, like):
    assert np.isnan(np.asarray(allocate(5))).all(), allocate
assert torch.empty(5, dtype=torch.int32).min() > 10**9 and np.empty(5, np.int64).min() > 10**9
assert torch.empty(0, 5).sum() == 0.0  # nothing is nothing

def refused(product):
    try:
        product()
    except AssertionError as error:
        return "not finite" in str(error)

weight = torch.ones(57, 3, dtype=torch.bfloat16)
# rows with room between them that nobody wrote
padded = torch.empty(4, 64, dtype=torch.bfloat16)[:, :57].zero_()
assert refused(lambda: padded @ weight) and refused(lambda: padded[:1] @ weight)
assert refused(lambda: weight.t() @ padded.t())
assert refused(lambda: padded.t() @ torch.ones(4, 3, dtype=torch.bfloat16))
assert refused(lambda: torch.mm(padded, weight, out=torch.empty(4, 3, dtype=torch.bfloat16)))
assert refused(lambda: torch.nn.functional.linear(padded, weight.t()))
cached = torch.empty(2, 64, 16)[:, :5].zero_()  # positions of a cache, and room for more
assert refused(lambda: torch.bmm(cached, torch.ones(2, 16, 3)))
gradient = torch.empty(4, 64)[:, :57].zero_()
leaf = torch.zeros(4, 3, requires_grad=True)
assert refused(lambda: (leaf @ torch.ones(3, 57)).backward(gradient))

whole = torch.zeros(4, 64, dtype=torch.bfloat16)[:, :57]
assert (whole @ weight == 0).all() and torch.ones(9, 4).t().mm(torch.ones(9, 2)).eq(9).all()
nan = torch.full((4, 64), torch.nan)[:, :57]
assert (nan @ weight.float()).isnan().all()  # what is NaN by itself is no news
if "child" not in sys.argv:
    code = "import torch; assert torch.empty(5).isnan().all()"
    subprocess.run([sys.executable, "-c", code], check=True)
"""


@pytest.mark.slow
def test_the_mode_shows_what_nobody_wrote() -> None:
    found = poisoned(SEEN)
    assert found.returncode == 0 and found.stderr == "", found.stderr


SCORED = """
import torch
from core.losses.scores import scores_of
from core.models.kv_cache import KeyValueCache
from core.models.readout import DistanceReadout, LinearReadout

for vocab_size in (57, 257, 301, 1000, 1024):
    weight = torch.nn.Parameter(torch.randn(vocab_size, 8))
    bias = torch.nn.Parameter(torch.randn(vocab_size))
    for readout in (LinearReadout(weight), LinearReadout(weight, bias), DistanceReadout(weight)):
        for in_bf16 in (True, False):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_bf16):
                scores = scores_of(torch.randn(6, 8), readout, [True, True, True])
                for rows in (6, 1):
                    found, gradient = scores.forward(torch.randn(rows, 8))
                    assert found.isfinite().all()
                    gradient.copy_(torch.randn(rows, vocab_size))
                    assert scores.backward(gradient).isfinite().all()
            assert all(found.isfinite().all() for found in scores.gradients())
cache = KeyValueCache(1)
for length in (5, 3, 80):
    keys, values = cache.extend(0, torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16))
    torch.nn.functional.scaled_dot_product_attention(torch.randn(2, 2, 4, 16), keys, values)
"""


@pytest.mark.slow
def test_scores_and_caches_leave_nothing_unwritten_beside_what_is_read() -> None:
    """On AMX, bf16 products read the room between rows: gradients were NaN at every vocabulary that
    is no multiple of 64."""
    found = poisoned(SCORED)
    assert found.returncode == 0, found.stderr
