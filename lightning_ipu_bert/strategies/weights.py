"""Whole models and their parts: what lies on another stage is only a shape here.

Parameters of other stages become meta tensors: they keep name, shape and place, so that optimizers,
state dicts and checkpoints are numbered and named as those of the whole model.
"""

from __future__ import annotations

from typing import Any, Dict, List, Sequence

import torch
import torch.distributed as dist
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_ipu_bert.pipeline.interface import block_of


def keep_only(module: nn.Module, blocks: Sequence[str], mine: Sequence[str]) -> None:
    """Free the parameters of blocks that are not `mine`."""
    for name, parameter in list(module.named_parameters()):
        if block_of(name, blocks) not in mine:
            _replace(module, name, parameter.to("meta"))


def own_state(module: nn.Module, blocks: Sequence[str], mine: Sequence[str]) -> Dict[str, Tensor]:
    """Return the state of the blocks that are `mine`, on the CPU."""
    return {
        name: value.cpu() if isinstance(value, Tensor) else value
        for name, value in module.state_dict().items()
        if block_of(name, blocks) in mine
    }


def in_order(parts: Sequence[Dict[str, Any]], module: nn.Module) -> Dict[str, Any]:
    """Put the states of all stages into the order of the whole module.

    What belongs to no block (buffers of metrics, say) is on every rank, and is the module's own.
    """
    found = {name: value for part in parts for name, value in part.items()}
    return {name: found.get(name, value) for name, value in module.state_dict().items()}


def make_whole(module: nn.Module, state: Dict[str, Any]) -> None:
    """Fill every parameter that is only a shape, and every buffer, from a whole state."""
    for name, parameter in list(module.named_parameters()):
        if parameter.device.type == "meta":
            _replace(module, name, state[name].to(parameter.dtype))
    module.load_state_dict(state)


def gather_state(
    module: nn.Module, blocks: Sequence[str], mine: Sequence[str], group: Any, everywhere: bool
) -> Dict[str, Any]:
    """Return the whole state on the group's first rank, or everywhere; else nothing."""
    own = own_state(module, blocks, mine)
    parts: List[Any] = [None] * dist.get_world_size(group)
    if everywhere:
        dist.all_gather_object(parts, own, group=group)
    else:
        first = dist.get_rank(group) == 0
        dist.gather_object(own, parts if first else None, dist.get_global_rank(group, 0), group)
        if not first:
            return {}
    return in_order(parts, module)


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Put another tensor where a parameter is; under all its names, if it is tied."""
    old = module.get_parameter(name)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    for other, parameter in list(module.named_parameters(remove_duplicate=False)):
        if parameter is old:
            home, _, last = other.rpartition(".")
            setattr(module.get_submodule(home), last, new)


def broadcast_parameters(module: nn.Module, group: Any) -> None:
    """Give all replicas the weights of the first."""
    source = dist.get_global_rank(group, 0)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.device.type != "meta":
                dist.broadcast(tensor, source, group)


def move_to(module: LightningModule, device: torch.device) -> None:
    """Move what is here; shapes of other stages stay shapes."""
    module._apply(lambda t: t if t.is_meta else t.to(device))  # type: ignore[no-untyped-call]
    _update_properties(module, device=device)
