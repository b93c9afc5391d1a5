"""Numbers of batches, on which the ranks of a replica and the replicas of a run agree."""

from __future__ import annotations

from contextlib import suppress
from typing import Optional, Sized

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_ipu_bert.strategies.distributed.mesh import Mesh


def length_in_replica(
    loader: object, mesh: Mesh, device: torch.device, training: bool
) -> Optional[int]:
    """Return the number of batches on the reading rank; in training, the least of replicas.

    Args:
        loader: The loader of this rank.
        mesh: Mesh coordinates and groups of this rank.
        device: Device of the collectives of replicas.
        training: Whether all replicas must have the same number.

    Returns:
        None for iterables of unknown length.
    """
    length = torch.tensor(-1)
    if not mesh.pipeline_rank:
        with suppress(TypeError, NotImplementedError):  # raised by loaders of iterable datasets
            length = torch.tensor(len(loader) if isinstance(loader, Sized) else -1)
        if training:
            length = _least_of_replicas(length, mesh, device)
    dist.broadcast(length, dist.get_global_rank(mesh.data_group, 0), mesh.data_group)
    return int(length) if length >= 0 else None


def _least_of_replicas(length: Tensor, mesh: Mesh, device: torch.device) -> Tensor:
    both = torch.stack([length, -length]).to(device)
    dist.all_reduce(both, dist.ReduceOp.MIN, mesh.replica_group)
    least, most = int(both[0]), -int(both[1])
    if least != most and least >= 0:
        rank_zero_warn(
            f"Replicas have between {least} and {most} training batches per epoch: the first "
            f"{least} of each are used. Divide the data equally, e.g. by "
            "trainer.distributed_sampler_kwargs."
        )
    return torch.tensor(least)


def all_replicas(has_batch: bool, mesh: Mesh, device: torch.device) -> bool:
    """Return whether all replicas have another batch."""
    vote = torch.tensor(int(has_batch), device=device)
    dist.all_reduce(vote, dist.ReduceOp.MIN, mesh.replica_group)
    return bool(vote)
