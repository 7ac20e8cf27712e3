"""Every rank holds a share of weights, gradients and the optimizer's state; torch's FSDP2 brings
the weights of a block together while it computes.

    block 0 | block 1 | ... | the rest of the model (embedding, norm, readout) | auxiliary heads
    each a unit: gathered before its forward pass, freed behind it, gathered again for the backward

Weights stay fp32, and autocast computes in bf16 as with every other engine: the same mathematics,
whatever the number of ranks (ZeRO stage 3: Rajbhandari et al. 2020, arXiv 1910.02054; Zhao et al.
2023, arXiv 2304.11277)."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

from core.errors import UserError
from core.parallel.blocks import blocks_of
from core.parallel.processes import HOST_TIMEOUT
from core.parallel.room import make_sure_of_room
from core.parallel.shards import collected, weights_by_name
from core.parallel.updates import TorchUpdates


class FSDP(TorchUpdates):
    """A share on every rank; see Engine in core/parallel/protocol.py."""

    name, compiles = "fsdp", False

    def __init__(self, group: dist.ProcessGroup):
        # hidden states may be views of others, and nothing here writes into them
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        self._group, self._rank = group, dist.get_rank(group)
        # saves are written in the background: what they exchange must not meet the steps' own
        background = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
        self.savers: DeviceMesh | None = DeviceMesh.from_group(
            cast(dist.ProcessGroup, background), "cpu"
        )
        self._exchange = _Exchange()
        self._blocks: list[FSDPModule] = []
        self._roots: list[FSDPModule] = []

    def place(self, model: nn.Module, heads: nn.Module | None, device: torch.device) -> None:
        if numbers := [name for name, p in model.named_parameters() if p.ndim == 0]:
            raise UserError(
                f'train.engine "fsdp" cannot share out {numbers[0]}, which is a single number. Set '
                'train.engine to "ddp".'
            )
        mesh = DeviceMesh.from_group(self._group, device.type)
        self._blocks = [fully_shard(block, mesh=mesh) for block in blocks_of(model)]
        roots = [model] if heads is None else [model, heads]
        self._roots = [fully_shard(root, mesh=mesh) for root in roots]
        for unit in (*self._blocks, *self._roots):
            unit.set_custom_all_gather(self._exchange.gather)
            unit.set_custom_reduce_scatter(self._exchange.scatter)
        for root in self._roots:  # not at its first pass: a run may be evaluated, or fail, before
            root._get_fsdp_state()._lazy_init()

    def close(self) -> None:
        assert self.savers is not None
        dist.destroy_process_group(self.savers.get_group())

    def wrap(self, objective: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> nn.Module:
        self._objective = objective
        return objective

    @contextmanager
    def one_pass(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Gradients are shared out after every micro-batch: whole ones would not fit."""
        try:
            yield
        except BaseException:
            self._begin_anew()
            raise
        for root in self._roots:
            # FSDP ends a backward pass where one of its blocks saw it; where all of them are
            # frozen none does. Twice is as good as once.
            root._get_fsdp_state()._root_post_backward_final_callback()

    @contextmanager
    def trial(self) -> Iterator[None]:
        self._exchange.is_off = True
        try:
            yield
        finally:
            self._exchange.is_off = False
            self._begin_anew()

    @contextmanager
    def whole(self) -> Iterator[None]:
        weights = [p for root in self._roots for p in cast(nn.Module, root).parameters()]
        make_sure_of_room(sum(p.numel() for p in weights), weights[0].device, self._group)
        try:
            for unit in (*self._blocks, *self._roots):
                unit.unshard()
            self._keep_gathered(True)
            yield
        finally:
            self._keep_gathered(False)
            self._begin_anew()

    def weights_of(self, module: nn.Module) -> dict[str, Tensor]:
        return weights_by_name(module, self._rank)

    def collect(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        return collected(states, self._rank)

    def _keep_gathered(self, keep: bool) -> None:
        for block in self._blocks:
            block.set_reshard_after_forward(not keep, recurse=False)

    def _begin_anew(self) -> None:
        """Share out what is gathered, and forget a pass that was left in the middle."""
        for root in self._roots:
            root.reset_iter_state()
            for parameter in cast(nn.Module, root).parameters():
                parameter.grad = None


class _Exchange:
    """What the units gather and reduce with. Switched off, nothing travels: the same memory is
    taken, and its content means nothing."""

    def __init__(self) -> None:
        self.is_off = False
        self.gather, self.scatter = _Gather(self), _Scatter(self)


class _Gather(DefaultAllGather):
    def __init__(self, exchange: _Exchange):
        super().__init__()
        self._exchange = exchange

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        if not self._exchange.is_off:
            return super().__call__(output_tensor, input_tensor, group, async_op)
        output_tensor.view(group.size(), -1).copy_(input_tensor.expand(group.size(), -1))
        return None


class _Scatter(DefaultReduceScatter):
    def __init__(self, exchange: _Exchange):
        super().__init__()
        self._exchange = exchange

    # nothing to wait for where it is off
    def __call__(  # type: ignore[override]
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        if not self._exchange.is_off:
            return super().__call__(output_tensor, input_tensor, group, op, async_op)
        output_tensor.copy_(input_tensor[: len(output_tensor)])
        return None
