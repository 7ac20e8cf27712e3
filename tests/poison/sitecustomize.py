"""Memory that nobody has written yet, made visible: Python runs this at its start where this folder
is on PYTHONPATH.

    PYTHONPATH=$PWD/tests/poison python -m pytest tests/losses

In that process, and in all that it starts:

- what torch and numpy allocate without writing it holds NaN, and whole numbers the largest there
  are, instead of whatever was there before, which is 0 more often than not;
- a matrix product refuses an operand beside whose rows such NaNs lie. Some processors' kernels read
  on to the end of a block of 64 numbers and multiply what they find there by 0 (oneDNN does, for
  bf16 on AMX). This is how any processor shows it.
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
"""Numbers that a kernel may read in one go."""
PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "mm.out",
    "addmm.out",
    "bmm.out",
    "baddbmm.out",
    "addmm_",
    "baddbmm_",
    "addmv",
    "mv",
)
PRODUCTS += ("_scaled_dot_product_flash_attention_for_cpu",)


def beside(x: Tensor) -> Tensor:
    """All numbers from the first of a view to the end of its last row's block, whether they belong
    to the view or not."""
    end = (
        x.storage_offset()
        + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        + 1
    )
    steps = sorted(stride for stride in x.stride() if stride > 1)
    # to the end of the last row's block, as far as the step to the next row says there is one
    if steps and min(x.stride()) == 1:
        last = x.shape[x.stride().index(1)]
        end += min(-last % BLOCK, max(0, steps[0] - last))
    end = min(end, x.untyped_storage().nbytes() // x.element_size())
    return x.detach().as_strided((end - x.storage_offset(),), (1,))


def refuse_poison(name: str, operand: object) -> None:
    """Raises where not-finite numbers lie beside those of an operand."""
    if not isinstance(operand, Tensor) or not operand.is_floating_point() or operand.numel() == 0:
        return
    everything = beside(operand)
    # one that is NaN itself has nothing to hide
    if everything.numel() == operand.numel() or not operand.isfinite().all():
        return
    if around := int((~everything.isfinite()).sum()):
        raise AssertionError(
            f"{name} of {tuple(operand.shape)} with steps of {operand.stride()}: {around} numbers "
            "beside it are not finite, and "
            "a kernel may read them: memory that was never written?"
        )


def _watch(library: torch.library.Library, name: str) -> None:
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keys: torch.DispatchKeySet, *args: object, **kwargs: object) -> object:
        for operand in args:
            refuse_poison(name, operand)
        return kernel.call_boxed(keys, *args, **kwargs)

    library.impl(name, product, "CPU", with_keyset=True)


def _poisoned(empty: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def filled(*args: object, **kwargs: object) -> np.ndarray:
        array = empty(*args, **kwargs)
        if array.dtype.kind in "fciu":
            array.fill(np.nan if array.dtype.kind in "fc" else np.iinfo(array.dtype).max)
        return array

    return filled


torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
np.empty = _poisoned(np.empty)
np.empty_like = _poisoned(np.empty_like)
LIBRARY = torch.library.Library("aten", "IMPL")
with warnings.catch_warnings(action="ignore"):  # that a kernel is replaced
    for product_name in PRODUCTS:
        _watch(LIBRARY, product_name)
