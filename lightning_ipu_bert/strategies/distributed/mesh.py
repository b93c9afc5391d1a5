"""The device mesh with the dimensions `replica` and `pipeline`, and its collectives."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Optional, TypeVar, Union

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Group = Optional[dist.ProcessGroup]
"""A group of ranks; None before groups are created."""


@dataclass(frozen=True)
class Mesh:
    """Mesh coordinates and groups of one rank: rank = replica x ranks per replica + pipeline rank.

    | dimension | size | splits | what is communicated, and when |
    |---|---|---|---|
    | `replica` | replication_factor | the examples of a global batch | ranks with the same
      stages: weights in `setup`, gradients and updated shards (RTS) per update, metrics (`reduce`,
      `all_gather`) |
    | `pipeline` | stages / stages_per_rank | the blocks of the model | ranks of one replica:
      batches of loaders, hidden states and their gradients per micro-batch, loss and output per
      batch, the gradient norm for clipping per update, the state dict per checkpoint |

    All ranks: barriers, decisions (early stopping, signals), optimizer state of checkpoints.
    """

    replica: int
    """Mesh coordinate in the dimension `replica`."""
    pipeline_rank: int
    """Mesh coordinate in the dimension `pipeline`; 0 holds the first stage."""
    replica_group: dist.ProcessGroup
    """Ranks that hold the same stages, one per replica."""
    pipeline_group: dist.ProcessGroup
    """Ranks of this replica, one per pipeline rank."""
    data_group: dist.ProcessGroup
    """The ranks of `pipeline_group`, for batches in host memory."""

    def global_rank(self, pipeline_rank: int) -> int:
        """Return the global rank of a pipeline rank of this replica."""
        return int(dist.get_global_rank(self.pipeline_group, pipeline_rank))


def create_mesh(replicas: int, ranks_per_replica: int, timeout: timedelta) -> Mesh:
    """Create the mesh; all ranks of the job must call it.

    Args:
        replicas: Size of the dimension `replica`.
        ranks_per_replica: Size of the dimension `pipeline`.
        timeout: Timeout of communication; groups do not inherit that of the job.
    """
    number = replicas * ranks_per_replica
    of_stages = [
        dist.new_group(list(range(first, number, ranks_per_replica)), timeout)
        for first in range(ranks_per_replica)
    ]
    members = [
        list(range(first, first + ranks_per_replica))
        for first in range(0, number, ranks_per_replica)
    ]
    of_replicas = [dist.new_group(ranks, timeout) for ranks in members]
    for_data = [dist.new_group(ranks, timeout, backend="gloo") for ranks in members]
    replica, pipeline_rank = divmod(dist.get_rank(), ranks_per_replica)
    return Mesh(
        replica,
        pipeline_rank,
        of_stages[pipeline_rank],
        of_replicas[replica],
        for_data[replica],
    )


def world() -> dist.ProcessGroup:
    """Return the group of all ranks."""
    group = dist.group.WORLD
    assert group is not None
    return group


def barrier() -> None:
    """Synchronize all ranks."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(value: T, source: int = 0) -> T:
    """Return the object of rank `source`."""
    if not dist.is_initialized():
        return value
    object_list = [value]
    dist.broadcast_object_list(object_list, source)
    return object_list[0]


def reduce(tensor: T, group: Group, reduce_op: object = "mean") -> Union[T, Tensor]:
    """Reduce a tensor over the ranks of a group.

    Unlike in Lightning's function, a mean of integers is not truncated: replicas may have evaluated
    different numbers of examples.

    Args:
        tensor: Returned unchanged if it is not a tensor.
        group: The group; None before it is created.
        reduce_op: A name, e.g. "mean", or a `ReduceOp`.
    """
    if not isinstance(tensor, Tensor) or group is None:
        return tensor
    name = str(reduce_op).rpartition(".")[2].upper()  # "mean", ReduceOp.SUM, ...
    mean = name in ("MEAN", "AVG")
    result = tensor.float() if mean and not tensor.is_floating_point() else tensor.clone()
    dist.all_reduce(result, vars(dist.ReduceOp)["SUM" if mean else name], group)
    return result / dist.get_world_size(group) if mean else result


def all_agree(decision: bool, device: torch.device, everyone: bool) -> bool:
    """Return whether all ranks, or any rank, decided True.

    Args:
        decision: Decision of this rank.
        device: Device of the collective.
        everyone: Whether all ranks must agree; otherwise one is sufficient.
    """
    votes = torch.tensor(int(decision), device=device)
    if not dist.is_initialized():
        return decision
    dist.all_reduce(votes)
    return bool(votes == dist.get_world_size()) if everyone else bool(votes)
