"""Optimizer states in checkpoints: the full state, as in a single process."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.strategies.distributed.optimizer_shards import OptimizerShards

Entries = Dict[int, Dict[str, Any]]
"""State of each parameter, by the index of the parameter."""


def gather_optimizer_state(
    optimizer: Optimizer, shards: Optional[OptimizerShards], plan: Plan
) -> Dict[str, object]:
    """Return the full state on rank 0 and {} on other ranks. All ranks must call it.

    Parameters of other stages are meta tensors, so that indices of parameters agree on all ranks.
    """
    shapes = [parameter.shape for parameter in _parameters(optimizer)]
    state = _state_dict(optimizer, shards)
    rank = dist.get_rank()
    ranks = plan.main.ranks_per_replica
    has_part = plan.shards_optimizer or rank < ranks
    own = _on_cpu(state["state"]) if has_part else {}
    parts: List[Any] = [None] * dist.get_world_size()
    dist.gather_object(own, parts if rank == 0 else None)
    if rank:
        return {}
    full: Entries = {}
    for pipeline_rank in range(ranks):
        replica_entries = (
            parts[pipeline_rank::ranks]
            if plan.shards_optimizer
            else parts[pipeline_rank : pipeline_rank + 1]
        )
        full.update(_joined(replica_entries, shapes))
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
        index: {
            key: value.reshape(-1)[shards.bounds(parameters[index], shards.replica)]
            if isinstance(value, Tensor) and value.dim()
            else value
            for key, value in entry.items()
        }
        for index, entry in entries.items()
    }
    with shards.installed():
        optimizer.load_state_dict({**state, "state": parts})


def _parameters(optimizer: Optimizer) -> List[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state_dict(optimizer: Optimizer, shards: Optional[OptimizerShards]) -> Dict[str, Any]:
    if shards is None:
        return optimizer.state_dict()
    with shards.installed():
        return optimizer.state_dict()


def _on_cpu(entries: Entries) -> Entries:
    return {
        index: {k: v.cpu() if isinstance(v, Tensor) else v for k, v in entry.items()}
        for index, entry in entries.items()
    }


def _joined(replica_entries: List[Entries], shapes: List[torch.Size]) -> Entries:
    """Concatenate the slices of all replicas; scalars are equal on all of them."""
    return {
        index: {
            key: torch.cat([part[index][key].reshape(-1) for part in replica_entries]).view(
                shapes[index]
            )
            if isinstance(value, Tensor) and value.dim()
            else value
            for key, value in entry.items()
        }
        for index, entry in replica_entries[0].items()
    }
