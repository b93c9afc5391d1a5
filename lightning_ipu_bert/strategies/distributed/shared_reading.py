"""Batches that replicas read at the same time, so that they run the same number of steps."""

from __future__ import annotations

from itertools import count
from typing import Iterator, List, Tuple

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_ipu_bert.strategies.distributed.lengths import all_replicas, replicas_with_batch
from lightning_ipu_bert.strategies.distributed.step_replicas import Replicas, StepReplicas

NO_BATCH = object()
SharedBatches = Iterator[Tuple[object, Replicas]]
"""Batches, each with the replicas that run the step."""


def training_batches(
    iterator: Iterator[object], replicas: StepReplicas, device: torch.device
) -> SharedBatches:
    """Yield as many batches as all replicas have.

    Args:
        iterator: The batches of this replica.
        replicas: The replicas that run a step.
        device: Device of the collectives of replicas.
    """
    for batch in iterator:
        if not all_replicas(True, replicas.mesh, device):
            rank_zero_warn(
                "Replicas have different numbers of training batches: the epoch ends with "
                "the first of them. Divide the data equally, e.g. by "
                "trainer.distributed_sampler_kwargs."
            )
            return
        yield batch, replicas.everyone
    all_replicas(False, replicas.mesh, device)


def evaluation_batches(
    iterator: Iterator[object],
    replicas: StepReplicas,
    device: torch.device,
    together: bool,
    divides: bool,
) -> SharedBatches:
    """Yield the batches of this replica.

    If a replica has none, and values are logged at the end of the epoch, yield the batches of all
    replicas instead, for steps of this replica alone.

    Args:
        iterator: The batches of this replica.
        replicas: The replicas that run a step.
        device: Device of the collectives of replicas.
        together: Whether values are logged at the end of the epoch.
        divides: Whether every replica has a batch of all loaders whose length is known.
    """
    running = replicas.everyone
    for number in count():
        batch = next(iterator, NO_BATCH)
        has_batch = batch is not NO_BATCH
        having = replicas_with_batch(has_batch, running, replicas, device)
        if not number and together and having and not (divides and having == running):
            replicas.evaluate_alone()
            yield from _batches_of_all(batch, iterator, replicas)
            return
        if not has_batch:
            return
        running = having
        yield batch, running


def _batches_of_all(
    batch: object, iterator: Iterator[object], replicas: StepReplicas
) -> SharedBatches:
    while True:
        own: List[object] = [] if batch is NO_BATCH else [batch]
        parts = [own] * len(replicas.everyone)
        dist.all_gather_object(parts, own, group=replicas.mesh.replica_group)
        if not any(parts):
            return
        for part in parts:
            for found in part:
                yield found, (replicas.mesh.replica,)
        batch = next(iterator, NO_BATCH)
