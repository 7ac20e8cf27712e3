"""DeepSpeed's engine, which shares out what the preset's ZeRO stage names (Rajbhandari et al. 2020,
arXiv 1910.02054).

    stage 0   nothing: every rank holds everything, as with DDP
    stage 1   the optimizer's state, and the weights that it updates: a second copy of them
    stage 2   the gradients too
    stage 3   the weights too: a module's are brought together while it computes

DeepSpeed averages gradients over the ranks and calls torch's optimizer on each share. All else is
as with every engine: weights stay fp32 and autocast computes in bf16; the gradient is clipped
before it is decided whether to update; checkpoints hold whole tensors by name. DeepSpeed has no
public functions for some of this, so its version is bounded in pyproject.toml."""

import difflib
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from core.errors import UserError
from core.optional_packages import need
from core.parallel.replicated import Replicated

VERSION = "0.19"
BUCKET = 25_000_000
"""Pairs of elements that travel together, at most: a buffer of so many is kept."""


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Raises UserError where DeepSpeed is missing, or does not take the preset's section."""
    known = import_deepspeed().runtime.zero.config.DeepSpeedZeroConfig
    try:
        known(**config["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        where, told = ".".join(map(str, first["loc"])), f"DeepSpeed says: {first['msg']}"
        if first["type"] == "extra_forbidden":
            keys = [name for key, of in known.model_fields.items() for name in (key, of.alias)]
            near = difflib.get_close_matches(where, filter(None, keys), n=1)
            told = "DeepSpeed has no such key" + (f'; did you mean "{near[0]}"?' if near else "")
        raise UserError(f"train.deepspeed.zero_optimization.{where}: {told}") from None


def import_deepspeed() -> Any:
    """Import it so that it builds nothing and tells of nothing. Raises UserError."""
    # else it looks for one, and tells of it
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    deepspeed: Any = need("deepspeed", "'deepspeed>=0.19,<0.20'", UserError)
    if not version("deepspeed").startswith(VERSION):
        raise UserError(
            f"engine deepspeed needs version {VERSION} of DeepSpeed, and {version('deepspeed')} is "
            "installed: pip install 'deepspeed>=0.19,<0.20'"
        )
    # none is compiled: that takes a compiler, and waits for ever on a lock that was left over
    import_module("deepspeed.ops").__compatible_ops__ = {}  # type: ignore[attr-defined]
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed.*is deprecated", FutureWarning)
    return deepspeed


class DeepSpeed(Replicated):
    """Stage 0; see Engine in core/parallel/protocol.py."""

    def __init__(self, config: Mapping[str, Any], group: dist.ProcessGroup):
        """`group`: of the ranks, over which tensors travel."""
        super().__init__(group)
        self.name, self._chosen = "deepspeed", config
        self._group: dist.ProcessGroup = group
        self._engine: Any = None

    def wrap(self, objective: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> nn.Module:
        import deepspeed

        self._objective = objective
        self._engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=optimizers[0],
            config=self._config(sum(p.numel() for p in objective.parameters())),
            dist_init_required=False,
        )
        return self._engine

    def _config(self, parameters: int) -> dict[str, Any]:
        """Return what DeepSpeed is told: the preset's section, and what is the program's own."""
        bucket = 2 * min(BUCKET, (parameters + 1) // 2)  # has to be even
        return {
            **self._chosen,
            "train_micro_batch_size_per_gpu": 1,  # it loads no data
            "gradient_accumulation_steps": 1,  # else it divides by them
            "gradient_clipping": 0.0,
            "steps_per_print": 2**62,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                # replaces F.linear in the whole process, and adds the bias in bf16
                "memory_efficient_linear": False,
                **self._chosen["zero_optimization"],
            },
        }

    def one_pass(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
