"""`PipelineParallelStrategy`: stages and replicas for any LightningModule that has blocks."""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, Mapping, Optional, Union

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn import Module
from torch.optim import Optimizer

from lightning_ipu_bert.pipeline.partition import partition
from lightning_ipu_bert.strategies import checks
from lightning_ipu_bert.strategies.executor import Place, TorchPipelineExecutor
from lightning_ipu_bert.strategies.optimizer_shards import OptimizerShards
from lightning_ipu_bert.strategies.optimizer_states import (
    gather_optimizer_state,
    load_optimizer_state,
)
from lightning_ipu_bert.strategies.precision import (
    PipelineMixedPrecision,
    PipelinePrecision,
    for_pipeline,
)
from lightning_ipu_bert.strategies.ranks import PipelineRanks
from lightning_ipu_bert.strategies.replicas import average_gradients
from lightning_ipu_bert.strategies.stage import Stage
from lightning_ipu_bert.strategies.throughput import count_replicas
from lightning_ipu_bert.strategies.weights import (
    broadcast_parameters,
    gather_state,
    keep_only,
    make_whole,
    move_to,
)


class PipelineParallelStrategy(PipelineRanks):
    """Runs a LightningModule as a pipeline of stages, in several replicas, on CPUs or GPUs.

    The module derives from `PipelineModule`. A loader yields the examples of one replica and one
    weight update: micro-batch x gradient_accumulation_steps.
    """

    _executor: Optional[TorchPipelineExecutor] = None

    # --- model ------------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Precision:
        """How numbers are represented, and gradients clipped over all stages."""
        if self._precision_plugin is None:
            self._precision_plugin = PipelinePrecision()
        return self._precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Optional[Precision]) -> None:
        self._precision_plugin = for_pipeline(plugin)

    def setup(self, trainer: Trainer) -> None:
        """Keep this rank's stages of the model and build what runs them."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module: Any = self.lightning_module
        blocks = list(module.pipeline_blocks())
        stages = partition(blocks, self.config.layers_per_stage)
        mine = self.config.stages_of(self.position)
        self._own_blocks = [block for stage in mine for block in stages[stage]]
        keep_only(module, blocks, self._own_blocks)
        self.precision_plugin.convert_module(module)
        self.model_to_device()
        broadcast_parameters(module, self._replica_group)
        recompute = self.config.recompute_checkpoint_every_layer
        place = Place(self._pipeline_group, self.root_device)
        self._executor = module._executor = TorchPipelineExecutor(
            module,
            [Stage(module, stage, stages[stage], recompute) for stage in mine],
            self.config,
            place,
            self.broadcast(int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))),
            self._loss_scale,
        )
        count_replicas(trainer, self.config)
        if trainer.state.fn == TrainerFn.FITTING:
            self._reset_optimizers_and_schedulers()
            self.setup_optimizers(trainer)
            self._shard_optimizers()
        self._setup_precision()

    def _setup_precision(self) -> None:
        plugin: Any = self.precision_plugin
        plugin.group = self._pipeline_group
        plugin.before_update = self._install_shards
        if isinstance(plugin, PipelineMixedPrecision):
            plugin.share_overflow(dist.group.WORLD)
        self.setup_precision_plugin()

    def _shard_optimizers(self) -> None:
        self._shards: Dict[int, OptimizerShards] = {}
        offchip = self.config.optimizer_state_offchip
        replicas = self.config.replication_factor if self.config.shards_optimizer else 1
        replica = self.replica if self.config.shards_optimizer else 0
        if offchip or self.config.shards_optimizer:
            self._shards = {
                id(optimizer): OptimizerShards(
                    optimizer, replica, replicas, self._replica_group, offchip
                )
                for optimizer in self.optimizers
            }

    def _loss_scale(self) -> float:
        scaler = getattr(self.precision_plugin, "scaler", None)
        return float(scaler.scale(torch.ones((), device=self.root_device))) if scaler else 1.0

    def model_to_device(self) -> None:
        """Move this rank's part of the model."""
        assert self.lightning_module is not None
        move_to(self.lightning_module, self.root_device)

    # --- steps ------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Check the loaders' batches."""
        super().on_train_start()
        assert self.lightning_module is not None
        checks.check_loaders(self.lightning_module.trainer.train_dataloader, self.config)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own training_step; its `run_loss` runs the stages."""
        assert self._executor is not None
        assert self.lightning_module is not None
        self._executor.steps = self.lightning_module.trainer.fit_loop.total_batch_idx
        return super().training_step(*args, **kwargs)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Optional[Union[LightningModule, Module]] = None,
        **kwargs: Any,
    ) -> Any:
        """Update the weights by the mean of the replicas' gradients.

        The mean is taken inside the closure: hooks, clipping and the optimizer see nothing else.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def averaged() -> Any:
            result = closure()
            average_gradients(parameters, self._replica_group)
            return result

        output = super().optimizer_step(optimizer, averaged, model, **kwargs)
        shards = self._shards.get(id(optimizer))
        if shards:
            shards.remove()
            shards.exchange()
        return output

    def _install_shards(self, optimizer: Optimizer) -> None:
        if id(optimizer) in self._shards:
            self._shards[id(optimizer)].install()

    def process_dataloader(self, dataloader: object) -> object:
        """Let replicas share the examples of an evaluation without repeating any."""
        return checks.without_repeats(dataloader, self.lightning_module, self.config)

    # --- checkpoints ------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> Dict[str, Any]:
        """Return the whole model's state on the first rank, under its plain names."""
        assert self.lightning_module is not None
        if self._executor is None:
            return self.lightning_module.state_dict()
        return self._gather_state(everywhere=False) if self.replica == 0 else {}

    def _gather_state(self, everywhere: bool) -> Dict[str, Any]:
        module: Any = self.lightning_module
        blocks = list(module.pipeline_blocks())
        return gather_state(module, blocks, self._own_blocks, self._pipeline_group, everywhere)

    def optimizer_state(self, optimizer: Optimizer) -> Dict[str, Any]:
        """Return the whole optimizer state on the first rank, as one process would have it."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        return gather_optimizer_state(optimizer, self._shards.get(id(optimizer)), self.config)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of the optimizer states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            load_optimizer_state(optimizer, self._shards.get(id(optimizer)), state)

    # --- end --------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        """Remember that other ranks may be gone."""
        self._failed = True

    def teardown(self) -> None:
        """Give the whole trained weights back to the user's module."""
        module: Any = self.lightning_module
        if self._executor is not None and not self._failed:
            make_whole(module, self._gather_state(everywhere=True))
        if module is not None:
            module._executor = None
        self._executor = None
        if not self._failed:
            super().teardown()
