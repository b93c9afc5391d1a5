"""`PipelineParallelStrategy`: stages and replicas for any LightningModule that has blocks."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Callable, Dict, List, Literal, Mapping, Optional, Union

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.pipeline.partition import partition
from lightning_ipu_bert.strategies import checks
from lightning_ipu_bert.strategies.executor import Place, TorchPipelineExecutor
from lightning_ipu_bert.strategies.launcher import create_launcher
from lightning_ipu_bert.strategies.optimizer_shards import OptimizerShards, join_states, split_state
from lightning_ipu_bert.strategies.precision import (
    PipelineMixedPrecision,
    PipelinePrecision,
    for_pipeline,
)
from lightning_ipu_bert.strategies.replicas import average_gradients
from lightning_ipu_bert.strategies.stage import Stage
from lightning_ipu_bert.strategies.weights import (
    broadcast_parameters,
    gather_state,
    keep_only,
    make_whole,
    move_to,
)


class PipelineParallelStrategy(ParallelStrategy):
    """Runs a LightningModule as a pipeline of stages, in several replicas, on CPUs or GPUs.

    The module derives from `PipelineModule`. A loader yields the examples of one replica and one
    weight update: micro-batch x gradient_accumulation_steps.
    """

    def __init__(
        self,
        accelerator: Optional[Accelerator] = None,
        parallel_devices: Optional[List[torch.device]] = None,
        cluster_environment: Optional[ClusterEnvironment] = None,
        checkpoint_io: Optional[CheckpointIO] = None,
        precision_plugin: Optional[Precision] = None,
        process_group_backend: Optional[str] = None,
        timeout_seconds: float = 1800.0,
        start_method: Literal["popen", "fork", "spawn"] = "popen",
        **plan: Any,
    ) -> None:
        """Create the strategy.

        Args:
            accelerator: Set by the Trainer, as the next four.
            parallel_devices: Devices of this machine.
            cluster_environment: How processes find each other.
            checkpoint_io: How checkpoints are written.
            precision_plugin: How numbers are represented.
            process_group_backend: Backend of torch.distributed; gloo on CPUs, NCCL on GPUs.
            timeout_seconds: How long a rank waits for another before it gives up.
            start_method: How ranks of this machine are started; fork in notebooks.
            **plan: Fields of `PipelineConfig`. Without layers_per_stage the layers are shared by
                all devices, and gradient_accumulation_steps is at least their number.

        Raises:
            UserError: If the plan breaks a rule.
        """
        super().__init__(
            accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin
        )
        self._plan = plan
        self._config = PipelineConfig(**plan) if "layers_per_stage" in plan else None
        self.num_nodes = 1
        self.process_group_backend = process_group_backend
        self._timeout = timedelta(seconds=timeout_seconds)
        self._start_method = start_method
        self._pipeline_group: Any = None
        self._replica_group: Any = None
        self._executor: Optional[TorchPipelineExecutor] = None
        self._shards: Dict[int, OptimizerShards] = {}
        self._failed = False

    # --- ranks ------------------------------------------------------------------------------------

    @property
    def config(self) -> PipelineConfig:
        """The plan."""
        if self._config is None:
            stages = max(1, self.num_processes * self.num_nodes)
            steps = {"gradient_accumulation_steps": stages, **self._plan}
            self._config = PipelineConfig([-1] * stages, **steps)
        return self._config

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches in a batch of a loader."""
        return self.config.gradient_accumulation_steps

    @property
    def is_distributed(self) -> bool:
        """Lightning gives loaders a distributed sampler only to strategies that say so."""
        return True

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Ranks on this machine."""
        return len(self.parallel_devices or [])

    @property
    def replica(self) -> int:
        """Which replica this rank belongs to."""
        return self.global_rank // self.config.ranks_per_replica

    @property
    def position(self) -> int:
        """Where in its replica this rank stands; 0 holds the first stage."""
        return self.global_rank % self.config.ranks_per_replica

    @property
    def distributed_sampler_kwargs(self) -> Dict[str, Any]:
        """Data are shared by replicas; the ranks of a replica read the same."""
        return {"num_replicas": self.config.replication_factor, "rank": self.replica}

    def set_world_ranks(self) -> None:
        """Number the ranks over all machines."""
        if self.cluster_environment is not None:
            rank = self.node_rank * self.num_processes + self.local_rank
            self.cluster_environment.set_global_rank(rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        checks.check_devices(self.config, self.num_processes, self.num_nodes)
        self._launcher = create_launcher(self, self._start_method)

    def setup_environment(self) -> None:
        """Join the other ranks."""
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        device = self.root_device
        backend = self.process_group_backend or _get_default_process_group_backend_for_device(
            device
        )
        self.process_group_backend = backend
        assert self.cluster_environment is not None
        _init_dist_connection(self.cluster_environment, backend, timeout=self._timeout)
        ranks, replicas = self.config.ranks_per_replica, self.config.replication_factor
        for replica in range(replicas):
            group = dist.new_group(list(range(replica * ranks, (replica + 1) * ranks)))
            self._pipeline_group = group if replica == self.replica else self._pipeline_group
        for position in range(ranks):
            group = dist.new_group(list(range(position, replicas * ranks, ranks)))
            self._replica_group = group if position == self.position else self._replica_group

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
        place = Place(self.replica, self.position, self._pipeline_group, self.root_device)
        self._executor = module._executor = TorchPipelineExecutor(
            module,
            [Stage(module, stage, stages[stage], recompute) for stage in mine],
            self.config,
            place,
            self.broadcast(int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))),
            self._loss_scale,
        )
        if trainer.state.fn == TrainerFn.FITTING:
            self._reset_optimizers_and_schedulers()
            self.setup_optimizers(trainer)
            self._shard_optimizers()
        self._setup_precision()

    def _setup_precision(self) -> None:
        plugin: Any = self.precision_plugin
        plugin.group = dist.group.WORLD if self.config.shards_optimizer else self._pipeline_group
        if isinstance(plugin, PipelineMixedPrecision):
            plugin.share_overflow(dist.group.WORLD)
        self.setup_precision_plugin()

    def _shard_optimizers(self) -> None:
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
        shards = self._shards.get(id(optimizer))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def averaged() -> Any:
            result = closure()
            average_gradients(parameters, self._replica_group)
            if shards:
                shards.install()
            return result

        output = super().optimizer_step(optimizer, averaged, model, **kwargs)
        if shards:
            shards.remove()
            shards.exchange()
        return output

    def process_dataloader(self, dataloader: object) -> object:
        """Let replicas share the examples of an evaluation without repeating any."""
        return checks.without_repeats(dataloader, self.lightning_module, self.config)

    # --- collectives ------------------------------------------------------------------------------

    def barrier(self, name: Optional[str] = None) -> None:
        """Wait for all ranks."""
        if dist.is_initialized():
            dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object of rank `src`."""
        if not dist.is_initialized():
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def reduce(
        self, tensor: Any, group: Optional[Any] = None, reduce_op: Optional[Any] = "mean"
    ) -> Any:
        """Combine the values of replicas; the ranks of a replica have the same."""
        if not isinstance(tensor, Tensor):
            return tensor
        return _sync_ddp_if_available(tensor, group or self._replica_group, reduce_op)

    def all_gather(
        self, tensor: Tensor, group: Optional[Any] = None, sync_grads: bool = False
    ) -> Tensor:
        """Return the values of all replicas; the ranks of a replica have the same."""
        return super().all_gather(tensor, group or self._replica_group, sync_grads)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all ranks, or any, decided so."""
        votes = torch.tensor(int(decision), device=self.root_device)
        if dist.is_initialized():
            dist.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)

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
        shards = self._shards.get(id(optimizer))
        shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
        if shards:
            with shards.installed():
                state = optimizer.state_dict()
        else:
            state = optimizer.state_dict()
        own = _to_cpu(state["state"]) if self.config.shards_optimizer or self.replica == 0 else {}
        states: List[Any] = [None] * self.world_size
        dist.gather_object(own, states if self.is_global_zero else None)
        if not self.is_global_zero:
            return {}
        ranks = self.config.ranks_per_replica
        merged: Dict[int, Any] = {}
        for position in range(ranks):
            of_replicas = states[position::ranks]
            whole = join_states(of_replicas, shapes) if shards and shards.replicas > 1 else None
            merged.update(whole if whole is not None else of_replicas[0])
        state["state"] = {index: _shaped(merged[index], shapes[index]) for index in sorted(merged)}
        return dict(state)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of the optimizer states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            here = {i: v for i, v in state["state"].items() if not parameters[i].is_meta}
            own = {**state, "state": here}
            shards = self._shards.get(id(optimizer))
            if shards:
                with shards.installed():
                    optimizer.load_state_dict(split_state(own, shards))
            else:
                optimizer.load_state_dict(own)

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


def _to_cpu(state: Dict[int, Any]) -> Dict[int, Any]:
    return {
        index: {k: v.cpu() if isinstance(v, Tensor) else v for k, v in entries.items()}
        for index, entries in state.items()
    }


def _shaped(entries: Dict[str, Any], shape: torch.Size) -> Dict[str, Any]:
    """Give flat state the shape of its parameter."""
    return {
        k: v.view(shape) if isinstance(v, Tensor) and v.dim() and v.numel() == shape.numel() else v
        for k, v in entries.items()
    }
