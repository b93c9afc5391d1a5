"""The state of one run on this rank, and the stages that are placed here."""

from __future__ import annotations

import os
from typing import Any, Dict, Iterable, List, Mapping, Optional

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from torch.optim import Optimizer

from lightning_ipu_bert._compat.lightning import callbacks_of
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.strategies.distributed import mesh as collectives
from lightning_ipu_bert.strategies.distributed import weights
from lightning_ipu_bert.strategies.distributed.executor import TorchPipelineExecutor
from lightning_ipu_bert.strategies.distributed.generators import ReplicaGenerators
from lightning_ipu_bert.strategies.distributed.hooks import RunHooks
from lightning_ipu_bert.strategies.distributed.launch.failure import report
from lightning_ipu_bert.strategies.distributed.launch.ranks import Ranks
from lightning_ipu_bert.strategies.distributed.launch.signals import signals_of_ranks
from lightning_ipu_bert.strategies.distributed.loaders import loader_of_replica
from lightning_ipu_bert.strategies.distributed.norms import GradientNorms
from lightning_ipu_bert.strategies.distributed.optimizer_shards import OptimizerShards
from lightning_ipu_bert.strategies.distributed.optimizer_states import (
    gather_optimizer_state,
    load_optimizer_state,
)
from lightning_ipu_bert.strategies.distributed.precision import GlobalNorm, connect, loss_scale
from lightning_ipu_bert.strategies.distributed.reading import ReplicaReader
from lightning_ipu_bert.strategies.distributed.stage import Stage
from lightning_ipu_bert.strategies.distributed.throughput import count_replicas


class Run:
    """A fit, validate, test or predict: created in `setup`, dropped in `teardown`."""

    def __init__(
        self,
        trainer: Trainer,
        module: Any,
        ranks: Ranks,
        norms: GradientNorms,
        device: torch.device,
    ) -> None:
        """Create the run; model and Trainer are not modified yet.

        Args:
            trainer: The Trainer.
            module: The complete model.
            ranks: The ranks of the job, with plan and mesh.
            norms: Gradient norms of the strategy.
            device: Device of this rank.
        """
        assert ranks.mesh is not None
        self.trainer = trainer
        self.module = module
        self.plan = ranks.take_plan()
        self.mesh = ranks.mesh
        self.device = device
        self.stages = self.plan.main.stages_on(self.mesh.pipeline_rank)
        """Indices of the stages on this rank."""
        self.shards: Dict[int, OptimizerShards] = {}
        """By id of the optimizer."""
        self.norms = norms
        self.reader = ReplicaReader(self.mesh, device)
        self.generators = ReplicaGenerators(self.mesh, self.reader, ranks.loaded_generators)
        ranks.loaded_generators = []
        self.hooks = RunHooks(self.mesh, self.generators, self.load_all)
        self.signals = signals_of_ranks(ranks.environment, device, ranks.end_at_once)
        self._has_all = False  # whether the module has the weights of all stages
        self.failed = False
        """Whether collectives are impossible because other ranks may be gone."""

    def place(self, precision: Precision) -> None:
        """Keep the parameters of this rank, move them to the device, and create the executor."""
        assert isinstance(precision, GlobalNorm)
        weights.drop_other_stages(self.module, self.plan, set(self.stages))
        precision.convert_module(self.module)
        weights.move_to(self.module, self.device)
        weights.broadcast_parameters(self.module, self.mesh.replica_group)
        self.norms.connect(self.module, self.mesh.pipeline_group)
        connect(precision, self.norms, collectives.world())
        self.module.pipeline_executor = TorchPipelineExecutor(
            self.module,
            [Stage(self.module, self.plan, index, self.device) for index in self.stages],
            self.plan,
            self.mesh,
            self.device,
            seed=collectives.broadcast(int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))),
            batches_done=lambda: self.trainer.fit_loop.total_batch_idx,
            loss_scale=lambda: loss_scale(precision, self.device),
        )
        count_replicas(self.trainer, self.plan)
        callbacks = callbacks_of(self.trainer)
        callbacks[:] = [self.hooks, *callbacks, self.signals]
        self.hooks.attach(self.module)

    def loader(self, loader: Iterable[object], training: bool) -> Iterable[object]:
        """Return a loader of the Trainer as a loader of this replica, read by its first rank."""
        batches = self.plan.main.batches
        own = loader_of_replica(loader, batches, self.mesh.replica, training)
        return self.reader.attach(own, training)

    def shard_optimizers(self, optimizers: List[Optimizer]) -> None:
        """Shard the optimizers over replicas and move their state off the device, as planned."""
        sharded, offchip = self.plan.shards_optimizer, self.plan.optimizer_state_offchip
        replicas = self.plan.main.batches.replication_factor if sharded else 1
        for optimizer in optimizers if sharded or offchip else []:
            shards = OptimizerShards(
                optimizer,
                self.mesh.replica if sharded else 0,
                replicas,
                self.mesh.replica_group,
                offchip,
            )
            shards.attach()
            self.shards[id(optimizer)] = shards

    def state_dict(self) -> Dict[str, Any]:
        """Return the full state dict on the first rank, with the names of the plain model."""
        if self.mesh.replica:
            return {}
        return self._gather(everywhere=False)

    def optimizer_state(self, optimizer: Optimizer) -> Dict[str, object]:
        """Return the full optimizer state on the first rank, as in a single process."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return gather_optimizer_state(optimizer, self.shards.get(id(optimizer)), self.plan)

    def load_optimizer_states(
        self, optimizers: List[Optimizer], checkpoint: Mapping[str, Any]
    ) -> None:
        """Load the entries of this rank from the optimizer states of a checkpoint."""
        for optimizer, state in zip(optimizers, checkpoint["optimizer_states"]):
            load_optimizer_state(optimizer, self.shards.get(id(optimizer)), state)

    def load_all(self) -> None:
        """Load the full trained weights into the module, on every rank."""
        if not self._has_all:
            weights.load_full_state(self.module, self._gather(everywhere=True))
            self._has_all = True

    def finish(self) -> bool:
        """Detach, and leave the full trained weights in the module, on every rank.

        Returns:
            Whether the run has succeeded; otherwise other ranks may be gone, and with them weights.
        """
        self._detach()
        if not self.failed:
            self.load_all()
        return not self.failed

    def _detach(self) -> None:
        """Detach from module, Trainer and optimizers, without communication."""
        self.module.pipeline_executor = None
        self.signals.release()
        self.reader.detach()
        self.hooks.detach()
        callbacks = callbacks_of(self.trainer)
        callbacks[:] = [c for c in callbacks if c not in (self.hooks, self.signals)]
        for shards in self.shards.values():
            shards.detach()

    def _gather(self, everywhere: bool) -> Dict[str, object]:
        with self.hooks.expecting_parts():
            return weights.gather_state(
                self.module, self.plan, set(self.stages), self.mesh.pipeline_group, everywhere
            )


def report_failure(rank: int, run: Optional[Run], exception: BaseException) -> None:
    """Print in one line which rank failed in which step, unless the error is printed elsewhere."""
    if isinstance(exception, (UserError, SystemExit, KeyboardInterrupt)):
        return
    step = 0 if run is None else run.trainer.global_step
    stages = "?" if run is None else ", ".join(map(str, run.stages))
    report(rank, f"in step {step} (stage {stages})", exception)
