"""Batches that replicas read at the same time, so that they run the same number of steps."""

from __future__ import annotations

from itertools import count
from typing import Iterator, List, Tuple

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_ipu_bert.strategies.distributed.lengths import all_replicas, replicas_with_batch
from lightning_ipu_bert.strategies.distributed.mesh import Mesh
from lightning_ipu_bert.strategies.distributed.step_replicas import Replicas, StepReplicas

NO_BATCH = object()
SharedBatches = Iterator[Tuple[object, Replicas]]
"""Batches, each with the replicas that run the step."""


class SharedReading:
    """Reads the batches of an epoch on the reading rank of every replica."""

    def __init__(self, mesh: Mesh, device: torch.device, replicas: StepReplicas) -> None:
        """Create the object for an epoch.

        Args:
            mesh: Mesh coordinates and groups of this rank.
            device: Device of the collectives of replicas.
            replicas: The replicas that run a step.
        """
        self._mesh = mesh
        self._device = device
        self._replicas = replicas

    def of_training(self, iterator: Iterator[object]) -> SharedBatches:
        """Yield as many batches as all replicas have."""
        for batch in iterator:
            if not all_replicas(True, self._mesh, self._device):
                rank_zero_warn(
                    "Replicas have different numbers of training batches: the epoch ends with "
                    "the first of them. Divide the data equally, e.g. by "
                    "trainer.distributed_sampler_kwargs."
                )
                return
            yield batch, self._replicas.everyone
        all_replicas(False, self._mesh, self._device)

    def of_evaluation(
        self, iterator: Iterator[object], together: bool, divides: bool
    ) -> SharedBatches:
        """Yield the batches of this replica.

        If a replica has none, and values are logged at the end of the epoch, yield the batches of
        all replicas instead, for steps of this replica alone.

        Args:
            iterator: The batches of this replica.
            together: Whether values are logged at the end of the epoch.
            divides: Whether every replica has a batch of all loaders whose length is known.
        """
        replicas = self._replicas.everyone
        for number in count():
            batch = next(iterator, NO_BATCH)
            has_batch = batch is not NO_BATCH
            having = replicas_with_batch(has_batch, replicas, self._replicas, self._device)
            if not number and together and having and not (divides and having == replicas):
                yield from self._of_all_replicas(batch, iterator)
                return
            if not has_batch:
                return
            replicas = having
            yield batch, replicas

    def _of_all_replicas(self, batch: object, iterator: Iterator[object]) -> SharedBatches:
        self._replicas.evaluate_alone()
        while True:
            own: List[object] = [] if batch is NO_BATCH else [batch]
            parts = [own] * len(self._replicas.everyone)
            dist.all_gather_object(parts, own, group=self._mesh.replica_group)
            if not any(parts):
                return
            for part in parts:
                for found in part:
                    yield found, (self._mesh.replica,)
            batch = next(iterator, NO_BATCH)
