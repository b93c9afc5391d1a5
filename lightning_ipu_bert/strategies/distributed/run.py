"""The state of one run on this rank, and the stages that are placed here."""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from torch.optim import Optimizer

from lightning_ipu_bert._compat.lightning import callbacks_of
from lightning_ipu_bert._compat.loaders import divides_data
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.rules import enforce
from lightning_ipu_bert.strategies.distributed import mesh as collectives
from lightning_ipu_bert.strategies.distributed import weights
from lightning_ipu_bert.strategies.distributed.checks import optimizer_rules, tunes_batch_size
from lightning_ipu_bert.strategies.distributed.copies import ModelCopies, completed, copies_in
from lightning_ipu_bert.strategies.distributed.executor import TorchPipelineExecutor
from lightning_ipu_bert.strategies.distributed.generators import ReplicaGenerators
from lightning_ipu_bert.strategies.distributed.gradients import average_gradients, averaged_after
from lightning_ipu_bert.strategies.distributed.hooks import RunHooks
from lightning_ipu_bert.strategies.distributed.launch.failure import report
from lightning_ipu_bert.strategies.distributed.launch.ranks import Ranks
from lightning_ipu_bert.strategies.distributed.launch.signals import signals_of_ranks
from lightning_ipu_bert.strategies.distributed.loaders import loader_of_replica
from lightning_ipu_bert.strategies.distributed.norms import GradientNorms
from lightning_ipu_bert.strategies.distributed.optimizer_shards import OptimizerShards
from lightning_ipu_bert.strategies.distributed.optimizer_states import (
    drop_other_states,
    gather_optimizer_state,
    load_optimizer_state,
)
from lightning_ipu_bert.strategies.distributed.precision import GlobalNorm, connect, loss_scale
from lightning_ipu_bert.strategies.distributed.reading import ReplicaReader
from lightning_ipu_bert.strategies.distributed.throughput import count_replicas

T = TypeVar("T")


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
        self.plan = ranks.take_plan(trainer)
        self.mesh = ranks.mesh
        self.device = device
        self.stages = self.plan.main.stages_on(self.mesh.pipeline_rank)
        """Indices of the stages on this rank."""
        self.shards: Dict[int, OptimizerShards] = {}
        """By id of the optimizer."""
        self.norms = norms
        self.reader = ReplicaReader(self.mesh, device, ranks.step_replicas)
        self.generators = ReplicaGenerators(self.mesh, self.reader, ranks.loaded_generators)
        ranks.loaded_generators = []
        self.weights = weights.StageWeights(self.plan, set(self.stages), self.mesh.pipeline_group)
        self.copies = ModelCopies(self.mesh.pipeline_group)
        self.hooks = RunHooks(
            self.mesh, ranks.step_replicas, self.generators, self.load_all, self.load_buffers
        )
        self._first_callbacks = (ranks.step_replicas, self.hooks)
        self.signals = signals_of_ranks(
            ranks.environment, device, ranks.end_at_once, ranks.step_replicas.is_common_step
        )
        self._has_all = False  # whether the module has the weights of all stages
        self.failed = False
        """Whether collectives are impossible because other ranks may be gone."""

    def place(self, precision: Precision) -> None:
        """Keep the parameters of this rank, move them to the device, and create the executor."""
        assert isinstance(precision, GlobalNorm)
        resumes = self.trainer.ckpt_path is not None
        for copy in copies_in(callbacks_of(self.trainer), self.module, resumes):
            self.copies.add(copy)
            self.weights.drop_others(copy)
            weights.broadcast_parameters(copy, self.mesh.replica_group)
        self.weights.drop_others(self.module)
        precision.convert_module(self.module)
        weights.move_to(self.module, self.device)
        weights.broadcast_parameters(self.module, self.mesh.replica_group)
        self.norms.connect(self.module, self.mesh.pipeline_group)
        connect(precision, self.norms, collectives.world())
        self.module.pipeline_executor = TorchPipelineExecutor(
            self.module,
            self.plan,
            self.mesh,
            self.device,
            seed=collectives.broadcast(int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))),
            batches_done=lambda: self.trainer.fit_loop.total_batch_idx,
            loss_scale=lambda: loss_scale(precision, self.device),
            copied=self.copies.add,
        )
        count_replicas(self.trainer, self.plan)
        callbacks = callbacks_of(self.trainer)
        callbacks[:] = [*self._first_callbacks, *callbacks, self.signals]
        self.hooks.attach(self.module)

    @property
    def is_divided(self) -> bool:
        """Whether Lightning must divide examples among replicas.

        Not for `predict`: its sampler fails if there are fewer examples than replicas. And not
        before the run: BatchSizeFinder refuses to run when examples are divided.
        """
        return self.plan.main.batches.replication_factor > 1 and not self.trainer.predicting

    def loader(self, loader: Iterable[object]) -> Iterable[object]:
        """Return a loader of the Trainer as a loader of this replica, read by its first rank."""
        batches, stage = self.plan.main.batches, self.trainer.state.stage
        assert stage is not None
        divides, tunes = divides_data(self.trainer), tunes_batch_size(self.trainer)
        own = loader_of_replica(loader, batches, self.mesh.replica, stage, divides, tunes)
        return self.reader.attach(own, stage)

    def shard_optimizers(self, optimizers: List[Optimizer]) -> None:
        """Shard the optimizers over replicas and move their state off the device, as planned."""
        sharded, offchip = self.plan.shards_optimizer, self.plan.optimizer_state_offchip
        replicas = self.plan.main.batches.replication_factor if sharded else 1
        enforce(optimizer_rules(optimizers))
        drop_other_states(optimizers)
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

    def averaged_after(self, closure: Callable[[], T], optimizer: Optimizer) -> Callable[[], T]:
        """Return a closure that also averages the gradients of an optimizer over replicas.

        So that hooks, clipping and optimizer, which come after it, use the mean.
        """
        return averaged_after(closure, optimizer, self.mesh.replica_group)

    def after_backward(self) -> None:
        """Average the gradients of replicas, which manual optimization may clip before a step."""
        if not self.module.automatic_optimization:
            average_gradients(self.module.parameters(), self.mesh.replica_group)

    def state_dict(self) -> Dict[str, Any]:
        """Return the full state dict on the first rank, with the names of the plain model."""
        if self.mesh.replica:
            return {}
        with self.hooks.expecting_parts():
            return self.weights.state_dict(self.module)

    def completed(self, checkpoint: Dict[str, Any]) -> Dict[str, Any]:
        """Return a checkpoint with what callbacks save of other stages, on the first rank."""
        if self.mesh.replica:
            return checkpoint
        return completed(checkpoint, self.mesh.pipeline_group)

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
        """Load the full trained weights into the module and its copies, on every rank."""
        if not self._has_all:
            for model in (self.module, *self.copies.common()):
                self.weights.load_all(model)
            self._has_all = True

    def load_buffers(self) -> None:
        """Load the buffers of all stages into the module and its copies, on every rank."""
        for model in (self.module, *self.copies.common()):
            self.weights.load_buffers(model)

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
        self.copies.release()
        self.signals.release()
        self.reader.detach()
        self.hooks.detach()
        callbacks = callbacks_of(self.trainer)
        own = (*self._first_callbacks, self.signals)
        callbacks[:] = [callback for callback in callbacks if callback not in own]
        for shards in self.shards.values():
            shards.detach()


def report_failure(rank: int, run: Optional[Run], exception: BaseException) -> None:
    """Note a failure, and print which rank failed in which step, unless it is printed elsewhere."""
    if run is not None:
        run.failed = True
    if isinstance(exception, (UserError, SystemExit, KeyboardInterrupt)):
        return
    step = 0 if run is None else run.trainer.global_step
    stages = "?" if run is None else ", ".join(map(str, run.stages))
    report(rank, f"in step {step} (stage {stages})", exception)
