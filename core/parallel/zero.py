"""ZeRO's shares, as DeepSpeed keeps them: flat tensors over several parameters, of which each rank
has a stretch.

In:    parameters; what an optimizer keeps of them
Out:   this rank's part of each: of its weight, its gradient, the optimizer's state
State: DeepSpeed's engine
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.parallel.blocks import blocks_of
from core.parallel.deepspeed import DeepSpeed, import_deepspeed
from core.parallel.room import make_sure_of_room
from core.parallel.shards import collected, full, weights_by_name
from core.parallel.silence import Silence


def open_deepspeed(config: Mapping[str, Any], group: dist.ProcessGroup) -> DeepSpeed:
    """Return the engine of a stage. `group`: of the ranks, over which tensors travel."""
    os.environ.setdefault("LOCAL_RANK", "0")  # which it insists on
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist_init_required=False)
    # its groups would be of the host's backend, and have the host's time limit
    deepspeed.utils.groups._WORLD_GROUP = group
    stages = (DeepSpeed, Zero, Zero, ZeroThree)
    return stages[config["zero_optimization"]["stage"]](config, group)


class Stretch(NamedTuple):
    """The place of this rank's part of a parameter."""

    flat: Tensor  # that the optimizer updates: parts of several parameters
    start: int  # in `flat`
    first: int  # in the parameter, flattened
    length: int


@dataclass(frozen=True)
class Part:
    """This rank's part of a tensor; see core/parallel/shards.py."""

    values: Tensor  # (length,)
    first: int  # place of the first value in the tensor, flattened
    shape: torch.Size
    group: dist.ProcessGroup

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def to_local(self) -> Tensor:
        return self.values

    def full_tensor(self) -> Tensor:
        whole = self.values.new_zeros(self.shape.numel())
        whole[self.first : self.first + len(self.values)] = self.values
        dist.all_reduce(whole, group=self.group)  # adds zeros: exact
        return whole.view(self.shape)


class Zero(DeepSpeed):
    """Stages 1 and 2; see Engine in core/parallel/protocol.py.

    An optimizer counts the steps of a flat tensor, not of each parameter in it: one that starts
    afresh takes the count of the others."""

    def wrap(self, objective: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> nn.Module:
        self._shapes = {p: p.shape for p in objective.parameters() if p.requires_grad}
        groups = (group["params"] for group in optimizers[0].param_groups)
        self._groups = {p: i for i, group in enumerate(filter(None, groups)) for p in group}
        module = super().wrap(objective, optimizers)
        self._shares = self._engine.optimizer
        return module

    def clip(self, groups: Sequence[Sequence[nn.Parameter]], max_norm: float) -> Tensor:
        parts = [[g for p in group if (g := self._gradient(p)) is not None] for group in groups]
        device = next(iter(self._shapes)).device
        squares = torch.zeros(len(groups), dtype=torch.float64, device=device)
        for i, gradients in enumerate(parts):
            if gradients:
                each = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32))
                squares[i] = each.double().square().sum()
        dist.all_reduce(squares, group=self._group)
        norms = squares.sqrt().float()
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        for gradients, factor in zip(parts, factors):
            if gradients:
                torch._foreach_mul_(gradients, factor)
        return norms[0] + 0.0 * norms[1:].sum()

    @contextmanager
    def one_pass(self, module: nn.Module, last: bool) -> Iterator[None]:
        try:
            with super().one_pass(module, last):
                yield
        except BaseException:
            self._begin_anew()
            raise

    def update(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._engine.step()

    def forget(self) -> None:
        self._shares.zero_grad()
        self._shares.micro_step_id = -1
        for i in range(len(self._shares.bit16_groups)):
            self._shares.averaged_gradients[i] = self._shares.all_grad_tensors[i] = None

    @contextmanager
    def rewriting(self) -> Iterator[None]:
        yield
        self._shares.refresh_fp32_params()

    def state_of(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter
    ) -> Mapping[str, Any]:
        flat, stretch = self._flat_of(parameter), self._stretch(parameter)
        return {
            key: self._part(value, parameter, stretch) if value.ndim else value
            for key, value in optimizer.state.get(flat, {}).items()
        }

    def keep_state(
        self,
        optimizer: torch.optim.Optimizer,
        parameter: nn.Parameter,
        state: Mapping[str, Any] | None,
    ) -> None:
        flat, stretch = self._flat_of(parameter), self._stretch(parameter)
        kept = optimizer.state[flat]
        if state is not None:
            kept["step"] = state["step"].clone().to(flat.device)
        for key in ("exp_avg", "exp_avg_sq"):
            if state is not None and key not in kept:
                kept[key] = torch.zeros_like(flat.detach())
            if stretch is not None and key in kept:
                values = kept[key][stretch.start : stretch.start + stretch.length]
                values.zero_()
                if state is not None:
                    end = stretch.first + stretch.length
                    values.copy_(full(state[key]).reshape(-1)[stretch.first : end])

    def collect(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        return collected(states, dist.get_rank(self._group))

    @contextmanager
    def trial(self) -> Iterator[None]:
        from deepspeed.comm import comm

        backend, comm.cdb = comm.cdb, Silence(comm.cdb)
        try:
            yield
        finally:
            comm.cdb = backend
            self._begin_anew()

    def close(self) -> None:
        super().close()
        for flat in self._flats():  # what DeepSpeed holds for good is empty
            flat.data = flat.data.new_empty(0)

    # where things lie -----------------------------------------------------------------------------

    def _part(self, flat: Tensor, parameter: nn.Parameter, stretch: Stretch | None) -> Part:
        shape = self._shapes[parameter]
        if stretch is None:
            return Part(flat[:0], 0, shape, self._group)
        values = flat[stretch.start : stretch.start + stretch.length]
        return Part(values, stretch.first, shape, self._group)

    def _flats(self) -> list[Tensor]:
        return self._shares.single_partition_of_fp32_groups

    def _flat_of(self, parameter: nn.Parameter) -> Tensor:
        """Return the flat tensor of a parameter's group, whether or not this rank has a part."""
        return self._flats()[self._groups[parameter]]

    def _stretch(self, parameter: Any) -> Stretch | None:
        """Return where this rank's part of a parameter lies; None where it has none."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Stretch(self._flat_of(parameter), there.start, here.start, here.numel)

    def _gradient(self, parameter: Any) -> Tensor | None:
        """Return this rank's part of the averaged gradient, as a view."""
        if parameter not in self._shapes or parameter._hp_mapping is None:
            return None
        return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def _begin_anew(self) -> None:
        """Forget a pass that was left in the middle: what waits in buckets for the others, and what
        DeepSpeed counts in a backward pass."""
        for parameter in self._shapes:
            parameter.grad = None
        self.forget()
        shares = self._shares
        while shares._backward_active_depth:
            shares.exit_backward()
        reduced = shares.params_already_reduced  # a list, or in stage 3 a dict
        for key in range(len(reduced)) if isinstance(reduced, list) else reduced:
            reduced[key] = False
        self._empty_buckets()

    def _empty_buckets(self) -> None:
        for bucket in self._shares.ipg_buckets.values():
            bucket.clear()
        self._shares.extra_large_param_to_reduce.clear()
        self._shares.previous_reduced_grads.clear()
        self._shares._release_ipg_buffers()


class ZeroThree(Zero):
    """Stage 3. Weights are read outside their modules: those of blocks are brought together block
    by block, all others for a whole pass, as with FSDP."""

    compiles = False

    def wrap(self, objective: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> nn.Module:
        from deepspeed.runtime.zero import register_external_parameter

        of_blocks = {p for block in blocks_of(objective) for p in block.parameters()}
        module = super().wrap(objective, optimizers)
        self._offload = self._shares.parameter_offload
        self._weights: list[Any] = list(objective.parameters())
        for parameter in self._weights:
            if parameter not in of_blocks:
                register_external_parameter(objective, parameter)
        return module

    def forget(self) -> None:
        self._shares.zero_grad()
        self._shares.averaged_gradients = {}

    @contextmanager
    def rewriting(self) -> Iterator[None]:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(self._weights, modifier_rank=0):
            yield
        self._shares.refresh_fp32_params()

    @contextmanager
    def whole(self) -> Iterator[None]:
        from deepspeed.runtime.zero import GatheredParameters, parameter_offload

        weights = sum(parameter.ds_numel for parameter in self._weights)
        make_sure_of_room(weights, self._weights[0].device, self._group)
        with GatheredParameters(self._weights):
            for parameter in self._weights:
                parameter.ds_active_sub_modules.clear()
            # else a module would free its weights after its forward pass, and gather them before
            self._offload._remove_module_hooks()
            self._offload.forward_hooks.clear()
            self._offload.backward_hooks.clear()
            try:
                yield
            finally:
                self._offload.setup_zero_stage3_hooks()
                parameter_offload.FWD_MODULE_STACK.pop()  # which that puts there once more

    def weights_of(self, module: nn.Module) -> dict[str, Tensor]:
        return weights_by_name(module, dist.get_rank(self._group))

    def close(self) -> None:
        from deepspeed.runtime.zero import parameter_offload

        super().close()
        parameter_offload.FWD_MODULE_STACK.clear()
        for parameter in self._weights:
            parameter.ds_tensor.data = parameter.data = parameter.data.new_empty(0)

    def _flats(self) -> list[Tensor]:
        return self._shares.fp32_partitioned_groups_flat

    def _flat_of(self, parameter: nn.Parameter) -> Tensor:
        return self._flats()[self._place_of(parameter)[0]]

    def _stretch(self, parameter: Any) -> Stretch | None:
        group, start, length = self._place_of(parameter)
        first = dist.get_rank(self._group) * length
        length = min(length, self._shapes[parameter].numel() - first)  # the rest is padding
        return Stretch(self._flats()[group], start, first, length) if length > 0 else None

    def _place_of(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        return self._shares.grad_position[self._shares.get_param_id(parameter)]

    def _gradient(self, parameter: Any) -> Tensor | None:
        if parameter not in self._shapes or (stretch := self._stretch(parameter)) is None:
            return None
        gradient = self._shares._get_fp32_grad_state_partition(
            parameter, release_swap_buffers=False
        )
        return gradient[0][: stretch.length]  # a NaN in the padding would stay there

    @contextmanager
    def trial(self) -> Iterator[None]:
        from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

        compare = coordinator.assert_ints_same_as_other_ranks
        coordinator.assert_ints_same_as_other_ranks = lambda ints: None
        try:
            with super().trial():
                yield
        finally:
            coordinator.assert_ints_same_as_other_ranks = compare

    def _empty_buckets(self) -> None:
        for bucket in self._shares.ipg_buckets.values():
            bucket.clear_params()  # the buffer stays for the whole run

    def _begin_anew(self) -> None:
        super()._begin_anew()
        coordinator = self._offload.get_param_coordinator()
        coordinator.release_backward_leftovers()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        self._offload.partition_all_parameters()
