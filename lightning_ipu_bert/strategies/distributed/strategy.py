"""`PipelineParallelStrategy`: pipeline parallelism for any LightningModule with named blocks."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Literal, Mapping, Optional, TypeVar, Union

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import final, override

from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.pipeline.facts import StrategyFacts
from lightning_ipu_bert.strategies.arguments import pipeline_config, plan_fields, suggest_names
from lightning_ipu_bert.strategies.distributed import mesh
from lightning_ipu_bert.strategies.distributed.generators import generators_in
from lightning_ipu_bert.strategies.distributed.launch.ranks import Launcher, Ranks
from lightning_ipu_bert.strategies.distributed.mesh import Group
from lightning_ipu_bert.strategies.distributed.norms import GradientNorms
from lightning_ipu_bert.strategies.distributed.precision import for_pipeline
from lightning_ipu_bert.strategies.distributed.run import Run, report_failure
from lightning_ipu_bert.training.termination import InterruptedBetweenSteps

T = TypeVar("T")


@final
class PipelineParallelStrategy(ParallelStrategy):
    """Runs a LightningModule as a pipeline of stages, with replicas, on CPUs or GPUs.

    The module must derive from `PipelineModule`. A batch of a loader is the batch of a replica per
    weight update: micro-batch x gradient_accumulation_steps examples.
    """

    @suggest_names
    def __init__(
        self,
        *,
        layers_per_stage: Optional[List[int]] = None,
        replication_factor: Optional[int] = None,
        gradient_accumulation_steps: Optional[int] = None,
        stages_per_rank: int = 1,
        schedule: str = "1f1b",
        recompute_checkpoint_every_layer: Optional[bool] = None,
        replicated_tensor_sharding: Optional[bool] = None,
        optimizer_state_offchip: Optional[bool] = None,
        ipu_config: Union[str, Dict[str, Any], None] = None,
        pod_type: Optional[str] = None,
        loss_scaling: Optional[float] = None,
        process_group_backend: Optional[str] = None,
        timeout_seconds: float = 1800.0,
        start_method: Literal["popen", "fork", "spawn"] = "popen",
        accelerator: Optional[Accelerator] = None,
        parallel_devices: Optional[List[torch.device]] = None,
        cluster_environment: Optional[ClusterEnvironment] = None,
        checkpoint_io: Optional[CheckpointIO] = None,
        precision_plugin: Optional[Precision] = None,
    ) -> None:
        """Create the strategy.

        Args:
            layers_per_stage: Number of layers on each stage, e.g. [3, 7, 7, 7]; stages with -1
                share the remaining layers equally. Default: equal stages on all devices.
            replication_factor: Number of copies of the pipeline; each processes its own shard of
                the data.
            gradient_accumulation_steps: Micro-batches of a replica per weight update.
            stages_per_rank: Stages per process (looped: every n-th stage).
            schedule: Pipeline schedule: gpipe, 1f1b, interleaved_1f1b or zero_bubble.
            recompute_checkpoint_every_layer: Store only the inputs of layers and recompute their
                activations in the backward pass.
            replicated_tensor_sharding: Shard the optimizer state over the replicas (ZeRO stage 1).
            optimizer_state_offchip: Store the optimizer state in host memory.
            ipu_config: As in `IPUStrategy`: sets the arguments above that are not given.
                Other fields are ignored, so that a config can switch strategies by class_path.
            pod_type: Selects from values by pod type in ipu_config, e.g. pod16.
            loss_scaling: Ignored; used by `IPUStrategy` only.
            process_group_backend: Backend of torch.distributed; gloo on CPUs, NCCL on GPUs.
            timeout_seconds: Timeout of communication between ranks.
            start_method: How ranks on this machine are started; use fork in notebooks.
            accelerator: Set by the Trainer, like the others below.
            parallel_devices: Devices on this machine.
            cluster_environment: Ranks and addresses of the processes.
            checkpoint_io: Plugin that reads and writes checkpoints.
            precision_plugin: Precision plugin.

        Raises:
            UserError: If a value is invalid.
        """
        given = plan_fields(locals(), vars(PipelineConfig()))
        config, ignored = pipeline_config(given, ipu_config, pod_type)
        ignored += ["loss_scaling"] if loss_scaling is not None else []
        super().__init__(
            accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin
        )
        self._ranks = Ranks(config, ignored, process_group_backend, timeout_seconds, start_method)
        self._norms = GradientNorms()
        self.grad_norm = self._norms.grad_norm
        self.clip_grad_norm_ = self._norms.clip_grad_norm_
        self.num_nodes = 1
        self._run: Optional[Run] = None

    @property
    def config(self) -> PipelineConfig:
        """The configuration; `layers_per_stage` is set once the devices are known."""
        return self._ranks.config

    @property
    def run(self) -> Run:
        """The current run."""
        assert self._run is not None
        return self._run

    @property
    def facts(self) -> StrategyFacts:
        """The facts that models and data depend on."""
        return self._ranks.facts

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning must divide the examples of loaders among replicas."""
        return self._run is not None and self._run.is_divided

    @property
    def num_processes(self) -> int:
        """Number of ranks on this machine, required by Lightning's launchers."""
        return len(self.parallel_devices or [])

    @property
    @override
    def root_device(self) -> torch.device:
        return (self.parallel_devices or [])[self.local_rank]

    @property
    @override
    def distributed_sampler_kwargs(self) -> Dict[str, object]:
        return self._ranks.share(self.global_rank)

    @property
    @override
    def launcher(self) -> Optional[Launcher]:
        return self._ranks.launcher(self, self.num_nodes, self._fail)

    def set_world_ranks(self) -> None:
        """Set the ranks, after the Trainer has set devices and plugins."""
        self._ranks.number(self, self.num_nodes)
        self.precision_plugin = for_pipeline(self.precision_plugin)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.set_world_ranks()  # again: forked ranks know their local rank only now
        self._ranks.join(self.cluster_environment, self.root_device)

    @override
    def barrier(self, name: Optional[str] = None) -> None:
        mesh.barrier()

    @override
    def broadcast(self, obj: T, src: int = 0) -> T:
        return mesh.broadcast(obj, src)

    @override
    def reduce(self, tensor: T, group: Group = None, reduce_op: object = "mean") -> Any:
        return mesh.reduce(tensor, group or self._ranks.replica_group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Group = None, sync_grads: bool = False) -> Tensor:
        return super().all_gather(tensor, self._ranks.replicas_or(group), sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return mesh.all_agree(decision, self.root_device, all)

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self._run = Run(trainer, self.lightning_module, self._ranks, self._norms, self.root_device)
        self.run.place(self.precision_plugin)
        if trainer.state.fn == TrainerFn.FITTING:
            self.optimizers, self.lr_scheduler_configs = [], []  # those of a previous run
            self.setup_optimizers(trainer)
            self.run.shard_optimizers(self.optimizers)
        self.setup_precision_plugin()

    @override
    def model_to_device(self) -> None:
        """Do nothing: `Run.place` moves the parameters of this rank."""

    @override
    def process_dataloader(self, dataloader: Any) -> object:
        return self.run.loader(dataloader)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        self.run.after_backward()

    @override
    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], object], *args: Any, **kwargs: Any
    ) -> object:
        with self.run.norms.expected_in(self.run.module):
            averaged = self.run.averaged_after(closure, optimizer)
            return super().optimizer_step(optimizer, averaged, *args, **kwargs)

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        path = self.broadcast(checkpoint_path)  # BatchSizeFinder invents one on every rank
        checkpoint: Dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        self._ranks.loaded_generators = generators_in(checkpoint)
        return checkpoint

    @override
    def save_checkpoint(self, checkpoint: Dict[str, Any], *args: Any, **kwargs: Any) -> None:
        whole = checkpoint if self._run is None else self._run.completed(checkpoint)
        super().save_checkpoint(whole, *args, **kwargs)

    @override
    def lightning_module_state_dict(self) -> Dict[str, object]:
        run = self._run
        return super().lightning_module_state_dict() if run is None else run.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> Dict[str, Any]:
        run = self._run
        return super().optimizer_state(optimizer) if run is None else run.optimizer_state(optimizer)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self.run.load_optimizer_states(self.optimizers, checkpoint)

    def _fail(self, exception: BaseException) -> None:
        report_failure(self.global_rank, self._run, exception)

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self._run is not None and isinstance(exception, InterruptedBetweenSteps):
            self.teardown()  # Lightning 2.3 does not after Ctrl-C

    @override
    def teardown(self) -> None:
        run, self._run = self._run, None
        if run is None or run.finish():
            super().teardown()
