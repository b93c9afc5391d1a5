"""Numbers of batches, on which the ranks of a replica and the replicas of a run agree."""

from __future__ import annotations

from contextlib import suppress
from typing import List, Sized

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_ipu_bert.strategies.distributed.mesh import Mesh
from lightning_ipu_bert.strategies.distributed.step_replicas import Replicas, StepReplicas


def lengths_in_replicas(loader: object, mesh: Mesh, device: torch.device) -> List[int]:
    """Return the number of batches of every replica; empty if one of them is unknown.

    Args:
        loader: The loader of this rank; that of the reading rank counts.
        mesh: Mesh coordinates and groups of this rank.
        device: Device of the collectives of replicas.
    """
    replicas = dist.get_world_size(mesh.replica_group)
    lengths = torch.full((replicas,), -1)
    if not mesh.pipeline_rank:
        length = -1
        with suppress(TypeError, NotImplementedError):  # raised by loaders of iterable datasets
            length = len(loader) if isinstance(loader, Sized) else -1
        parts = [torch.tensor(0, device=device) for _ in range(replicas)]
        dist.all_gather(parts, torch.tensor(length, device=device), group=mesh.replica_group)
        lengths = torch.stack(parts).cpu()
    dist.broadcast(lengths, dist.get_global_rank(mesh.data_group, 0), mesh.data_group)
    found: List[int] = lengths.tolist()
    return [] if min(found) < 0 else found


def warn_of_unequal(lengths: List[int]) -> None:
    """Warn if replicas have different numbers of training batches.

    Args:
        lengths: From `lengths_in_replicas`.
    """
    if lengths and min(lengths) != max(lengths):
        rank_zero_warn(
            f"Replicas have between {min(lengths)} and {max(lengths)} training batches per epoch: "
            f"the first {min(lengths)} of each are used. Divide the data equally, e.g. by "
            "trainer.distributed_sampler_kwargs."
        )


def length_of_loop(lengths: List[int], stage: RunningStage, divides: bool) -> int:
    """Return the number of batches that Lightning expects, the same on all ranks.

    Args:
        lengths: From `lengths_in_replicas`; not empty.
        stage: What the batches are for.
        divides: Whether the batches of an evaluation are divided among replicas.
    """
    if stage == RunningStage.TRAINING:
        return min(lengths)
    return max(lengths) if divides or not evaluates_together(stage) else sum(lengths)


def evaluates_together(stage: RunningStage) -> bool:
    """Return whether replicas log values together at the end of an epoch, unlike in `predict`."""
    return stage not in (RunningStage.TRAINING, RunningStage.PREDICTING)


def all_replicas(has_batch: bool, mesh: Mesh, device: torch.device) -> bool:
    """Return whether all replicas have another batch."""
    vote = torch.tensor(int(has_batch), device=device)
    dist.all_reduce(vote, dist.ReduceOp.MIN, mesh.replica_group)
    return bool(vote)


def replicas_with_batch(
    has_batch: bool, replicas: Replicas, groups: StepReplicas, device: torch.device
) -> Replicas:
    """Return which of some replicas have another batch; all of them must call it.

    Args:
        has_batch: Whether this replica has one.
        replicas: The replicas that had one so far.
        groups: The groups of replicas.
        device: Device of the collective.
    """
    votes = [torch.tensor(0, device=device) for _ in replicas]
    if len(replicas) == 1:
        return replicas if has_batch else ()
    own = torch.tensor(int(has_batch), device=device)
    dist.all_gather(votes, own, group=groups.group_of(replicas))
    return tuple(replica for replica, vote in zip(replicas, votes) if vote)
