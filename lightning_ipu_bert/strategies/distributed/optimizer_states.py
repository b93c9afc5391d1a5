"""Optimizer states in checkpoints: the full state, as in a single process."""

from __future__ import annotations

from functools import partial
from typing import Any, Dict, Iterable, List, Mapping, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ipu_bert.batch_trees import Path, map_tree, paths_of, with_leaves
from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.strategies.distributed.optimizer_shards import OptimizerShards

Entries = Dict[int, Dict[str, object]]
"""State of each parameter, by the index of the parameter."""


def drop_other_states(optimizers: Iterable[Optimizer]) -> None:
    """Drop the state of parameters of other stages that some optimizers create immediately."""
    for optimizer in optimizers:
        for parameter in _parameters(optimizer):
            if parameter.is_meta:
                optimizer.state.pop(parameter, None)


def gather_optimizer_state(
    optimizer: Optimizer, shards: Optional[OptimizerShards], plan: Plan
) -> Dict[str, object]:
    """Return the full state on rank 0 and {} on other ranks. All ranks must call it.

    Parameters of other stages are meta tensors, so that indices of parameters agree on all ranks.
    """
    parameters = _parameters(optimizer)
    state = _state_dict(optimizer, shards)
    rank = dist.get_rank()
    ranks = plan.main.ranks_per_replica
    has_part = plan.shards_optimizer or rank < ranks
    own: object = state["state"] if has_part else {}
    own = map_tree(own, lambda x: x.cpu() if isinstance(x, Tensor) else x)
    parts: List[Any] = [None] * dist.get_world_size()
    dist.gather_object(own, parts if rank == 0 else None)
    if rank:
        return {}
    full: Entries = {}
    for pipeline_rank in range(ranks):
        of_replicas = parts[pipeline_rank :: ranks if plan.shards_optimizer else len(parts)]
        if shards is not None and shards.slices:
            full.update(_joined(of_replicas, [parameter.shape for parameter in parameters]))
        else:
            full.update({i: entry for part in of_replicas for i, entry in part.items()})
    return {**state, "state": {index: full[index] for index in sorted(full)}}


def load_optimizer_state(
    optimizer: Optimizer, shards: Optional[OptimizerShards], state: Mapping[str, Any]
) -> None:
    """Load the entries of this rank from a full state."""
    parameters = _parameters(optimizer)
    entries = {i: v for i, v in state["state"].items() if not parameters[i].is_meta}
    if shards is None:
        optimizer.load_state_dict({**state, "state": entries})
        return
    parts = {
        index: map_tree(entry, partial(shards.own_part, parameters[index]))
        for index, entry in entries.items()
        if shards.owns(parameters[index])
    }
    with shards.installed():
        optimizer.load_state_dict({**state, "state": parts})


def _parameters(optimizer: Optimizer) -> List[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state_dict(optimizer: Optimizer, shards: Optional[OptimizerShards]) -> Dict[str, Any]:
    if shards is None:
        return optimizer.state_dict()
    with shards.installed():
        return optimizer.state_dict()


def _joined(of_replicas: List[Entries], shapes: List[torch.Size]) -> Entries:
    """Concatenate the slices of all replicas; scalars are equal on all of them."""

    def join(index: int) -> Dict[str, object]:
        parts = [paths_of(entries[index]) for entries in of_replicas]
        joined: Dict[Path, object] = {}
        for path, value in parts[0].items():
            if isinstance(value, Tensor) and value.dim():
                slices = [part[path] for part in parts]
                flat = torch.cat([x.reshape(-1) for x in slices if isinstance(x, Tensor)])
                joined[path] = flat.view(shapes[index])
        return with_leaves(of_replicas[0][index], joined)

    return {index: join(index) for index in of_replicas[0]}
