"""Full models and stages: parameters placed on other ranks are meta tensors.

Meta tensors keep names, shapes and order, so that optimizers, state dicts and checkpoints use the
names and indices of the full model. This module makes checkpoints layout-independent;
`optimizer_states` does the same for the optimizer.
"""

from __future__ import annotations

from typing import Any, Dict, Sequence, Set

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_ipu_bert._compat.lightning import set_device
from lightning_ipu_bert._compat.torch import apply_to_tensors
from lightning_ipu_bert.pipeline.plan import Plan

State = Dict[str, Any]


def drop_other_stages(module: nn.Module, plan: Plan, own_stages: Set[int]) -> None:
    """Free the parameters of stages on other ranks."""
    for name, parameter in list(module.named_parameters()):
        if not own_stages.intersection(plan.stages_of(name)):
            _replace(module, name, parameter.to("meta"))


def own_state(module: nn.Module, plan: Plan, own_stages: Set[int]) -> State:
    """Return the state of the stages on this rank, on the CPU."""
    return {
        name: value.cpu() if isinstance(value, Tensor) else value
        for name, value in module.state_dict().items()
        if own_stages.intersection(plan.stages_of(name))
    }


def in_order(parts: Sequence[State], module: nn.Module) -> State:
    """Return the states of all stages in the order of the full module.

    Entries in no block (e.g. buffers of metrics) are on every rank and taken from the module.
    """
    found = {name: value for part in parts for name, value in part.items()}
    return {name: found.get(name, value) for name, value in module.state_dict().items()}


def load_full_state(module: nn.Module, state: State) -> None:
    """Materialize all meta parameters and load the full state."""
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta:
            _replace(module, name, state[name].to(parameter.dtype))
    module.load_state_dict(state)


def gather_state(
    module: nn.Module, plan: Plan, own_stages: Set[int], group: dist.ProcessGroup, everywhere: bool
) -> State:
    """Return the full state on the first rank of the group, or on all ranks; {} elsewhere."""
    own = own_state(module, plan, own_stages)
    parts = [own] * dist.get_world_size(group)
    if everywhere:
        dist.all_gather_object(parts, own, group=group)
    else:
        first = dist.get_rank(group) == 0
        dist.gather_object(own, parts if first else None, dist.get_global_rank(group, 0), group)
        if not first:
            return {}
    return in_order(parts, module)


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter, under all its names if it is tied."""
    old = module.get_parameter(name)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    for other, parameter in list(module.named_parameters(remove_duplicate=False)):
        if parameter is old:
            owner, _, last = other.rpartition(".")
            setattr(module.get_submodule(owner), last, new)


def broadcast_parameters(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Broadcast the weights of the first replica."""
    source = dist.get_global_rank(group, 0)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if not tensor.is_meta:
                dist.broadcast(tensor, source, group)


def move_to(module: LightningModule, device: torch.device) -> None:
    """Move the tensors of this rank to a device; meta tensors remain."""
    apply_to_tensors(module, lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    set_device(module, device)
