"""The replicas that run a step together: in evaluation some may have no batch left."""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import Deque, Dict, Optional, Tuple

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_ipu_bert._compat.lightning import is_in_batch
from lightning_ipu_bert.strategies.distributed.mesh import Mesh

Replicas = Tuple[int, ...]


class StepReplicas(Callback):
    """Groups for the collectives of steps: `self.log(sync_dist=True)`, `all_gather`, metrics.

    In training all replicas run the same number of steps. In evaluation the last steps may be those
    of some replicas only. If one has no batch at all, every replica evaluates all batches alone:
    values that are logged must be known on all ranks.
    """

    def __init__(self, mesh: Mesh, timeout: timedelta) -> None:
        """Create the groups of a rank, which so far are those of all replicas.

        Args:
            mesh: Mesh coordinates and groups of this rank.
            timeout: Timeout of communication.
        """
        self._timeout = timeout
        self.mesh = mesh
        self.everyone: Replicas = tuple(range(dist.get_world_size(mesh.replica_group)))
        self._groups: Dict[Replicas, dist.ProcessGroup] = {self.everyone: mesh.replica_group}
        self._in_epoch = self.everyone
        self._in_step = self.everyone
        self._module: Optional[LightningModule] = None
        self._read: Deque[Replicas] = deque()  # of batches that are read and not run yet

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks with the same stages whose replicas run the current step or epoch."""
        in_step = self._module is not None and is_in_batch(self._module)
        return self.group_of(self._in_step if in_step else self._in_epoch)

    @property
    def is_divided(self) -> bool:
        """Whether the examples of the epoch are divided among replicas."""
        return self._in_epoch == self.everyone

    def is_common_step(self) -> bool:
        """Return whether all replicas run the current step, together or each on its own."""
        return self._in_step == self.everyone or not self.is_divided

    def group_of(self, replicas: Replicas) -> dist.ProcessGroup:
        """Return the ranks of some replicas with the same stages; they must all call it."""
        if replicas not in self._groups:
            ranks_per_replica = dist.get_world_size(self.mesh.pipeline_group)
            ranks = [replica * ranks_per_replica + self.mesh.pipeline_rank for replica in replicas]
            self._groups[replicas] = dist.new_group(
                ranks, self._timeout, use_local_synchronization=True
            )
        return self._groups[replicas]

    def evaluate_alone(self) -> None:
        """Run all steps of this epoch on every replica, without the others."""
        self._in_epoch = self._in_step = (self.mesh.replica,)

    def read(self, replicas: Replicas) -> None:
        """Note which replicas run the step of the batch that was just read."""
        self._read.append(replicas)

    def _begin_step(self, module: LightningModule) -> None:
        """Run the step of the next batch that was read."""
        self._module = module
        self._in_step = self._read.popleft() if self._read else self._in_epoch

    def _end_epoch(self) -> None:
        self._read.clear()
        self._in_epoch = self._in_step = self.everyone

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: object
    ) -> None:
        self._begin_step(pl_module)

    @override
    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self._begin_step(pl_module)

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: object
    ) -> None:
        self._begin_step(pl_module)

    @override
    def on_validation_end(self, *_: object) -> None:
        self._end_epoch()

    @override
    def on_test_end(self, *_: object) -> None:
        self._end_epoch()

    @override
    def on_predict_end(self, *_: object) -> None:
        self._end_epoch()
