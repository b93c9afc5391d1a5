"""The state of one run on this rank, and the stages that are placed here."""

from __future__ import annotations

import os
from typing import Any, Dict, List, Mapping, Optional

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from torch.optim import Optimizer

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.strategies.distributed import mesh as collectives
from lightning_ipu_bert.strategies.distributed import weights
from lightning_ipu_bert.strategies.distributed.executor import TorchPipelineExecutor
from lightning_ipu_bert.strategies.distributed.launch.failure import report
from lightning_ipu_bert.strategies.distributed.launch.ranks import Ranks
from lightning_ipu_bert.strategies.distributed.launch.signals import signals_of_ranks
from lightning_ipu_bert.strategies.distributed.optimizer_shards import OptimizerShards
from lightning_ipu_bert.strategies.distributed.optimizer_states import (
    gather_optimizer_state,
    load_optimizer_state,
)
from lightning_ipu_bert.strategies.distributed.precision import GlobalNorm, connect, loss_scale
from lightning_ipu_bert.strategies.distributed.stage import Stage
from lightning_ipu_bert.strategies.distributed.throughput import count_replicas


class Run:
    """A fit, validate, test or predict: created in `setup`, dropped in `teardown`."""

    def __init__(self, trainer: Trainer, module: Any, ranks: Ranks, device: torch.device) -> None:
        """Create the run; model and Trainer are not modified yet.

        Args:
            trainer: The Trainer.
            module: The complete model.
            ranks: The ranks of the job, with plan and mesh.
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
        self.signals = signals_of_ranks(ranks.environment, device, ranks.end_at_once)
        self.failed = False
        """Whether collectives are impossible because other ranks may be gone."""

    def place(self, precision: Precision) -> None:
        """Keep the parameters of this rank, move them to the device, and create the executor."""
        assert isinstance(precision, GlobalNorm)
        weights.drop_other_stages(self.module, self.plan, set(self.stages))
        precision.convert_module(self.module)
        weights.move_to(self.module, self.device)
        weights.broadcast_parameters(self.module, self.mesh.replica_group)
        connect(precision, self.mesh.pipeline_group, collectives.world())
        self.module.pipeline_executor = TorchPipelineExecutor(
            self.module,
            [Stage(self.module, self.plan, index) for index in self.stages],
            self.plan,
            self.mesh,
            self.device,
            seed=collectives.broadcast(int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))),
            batches_done=lambda: self.trainer.fit_loop.total_batch_idx,
            loss_scale=lambda: loss_scale(precision, self.device),
        )
        count_replicas(self.trainer, self.plan)
        self.trainer.callbacks.append(self.signals)  # type: ignore[attr-defined]

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

    def finish(self) -> None:
        """Load the full trained weights into the module, on every rank."""
        self.close()
        weights.load_full_state(self.module, self._gather(everywhere=True))

    def close(self) -> None:
        """Detach from module, Trainer and optimizers, without communication."""
        self.module.pipeline_executor = None
        self.signals.release()
        if self.signals in self.trainer.callbacks:  # type: ignore[attr-defined]
            self.trainer.callbacks.remove(self.signals)  # type: ignore[attr-defined]
        for shards in self.shards.values():
            shards.detach()

    def _gather(self, everywhere: bool) -> Dict[str, Any]:
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
