"""`IPUStrategy`: pipeline parallelism on Graphcore IPUs, through PopTorch."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Optional, Union

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import final, override

from lightning_ipu_bert._compat.lightning import trainer_of
from lightning_ipu_bert.pipeline.facts import StrategyFacts
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig
from lightning_ipu_bert.pipeline.ipu.fields import PLAN_FIELDS
from lightning_ipu_bert.pipeline.ipu.file import read_values
from lightning_ipu_bert.pipeline.ipu.program import ipu_limit_rule, rank_only_rules
from lightning_ipu_bert.pipeline.rules import enforce
from lightning_ipu_bert.strategies.arguments import plan_fields, suggest_names
from lightning_ipu_bert.strategies.ipu import checkpoints
from lightning_ipu_bert.strategies.ipu.accelerator import IPUAccelerator, expand
from lightning_ipu_bert.strategies.ipu.checks import loss_scaling_rule, node_rule
from lightning_ipu_bert.strategies.ipu.console import overridden_fields
from lightning_ipu_bert.strategies.ipu.environment import PoprunEnvironment
from lightning_ipu_bert.strategies.ipu.loaders import LoaderMode
from lightning_ipu_bert.strategies.ipu.optimizer_checks import one_optimizer
from lightning_ipu_bert.strategies.ipu.precision import for_ipu
from lightning_ipu_bert.strategies.ipu.program.losses import refuse_other_losses
from lightning_ipu_bert.strategies.ipu.run import Run, facts_of_ipus
from lightning_ipu_bert.strategies.ipu.run_options import RunOptions, program_options


@final
class IPUStrategy(ParallelStrategy):
    """Runs a LightningModule as a pipeline of stages, with replicas, on IPUs.

    A config can switch to and from `PipelineParallelStrategy` by class_path.
    """

    @suggest_names
    def __init__(
        self,
        *,
        layers_per_stage: Optional[List[int]] = None,
        replication_factor: Optional[int] = None,
        gradient_accumulation_steps: Optional[int] = None,
        recompute_checkpoint_every_layer: Optional[bool] = None,
        replicated_tensor_sharding: Optional[bool] = None,
        optimizer_state_offchip: Optional[bool] = None,
        stages_per_rank: int = 1,
        schedule: str = "1f1b",
        ipu_config: Union[str, Dict[str, Any], None] = None,
        pod_type: Optional[str] = None,
        loss_scaling: Optional[float] = None,
        lamb: bool = False,
        loader_mode: LoaderMode = "sync",
        auto_round_num_ipus: bool = False,
        compile_only: bool = False,
        edit_options: Optional[Callable[[Any, bool], None]] = None,
        accelerator: Optional[Accelerator] = None,
        checkpoint_io: Optional[CheckpointIO] = None,
        precision_plugin: Optional[Precision] = None,
    ) -> None:
        """Create the strategy; does not require an IPU yet.

        Args:
            layers_per_stage: Number of layers on each IPU, e.g. [3, 7, 7, 7]; IPUs with -1 share
                the rest equally. Null uses ipu_config, as for the next five.
            replication_factor: Number of copies of the training pipeline.
            gradient_accumulation_steps: Micro-batches of a replica per weight update.
            recompute_checkpoint_every_layer: Store only the outputs of layers, recompute the rest.
            replicated_tensor_sharding: Shard the optimizer state over the replicas (RTS).
            optimizer_state_offchip: Store the optimizer state in Streaming Memory.
            stages_per_rank: Must be 1: an IPU holds one stage.
            schedule: Must be 1f1b, the schedule of PopTorch.
            ipu_config: Fields of `IPUConfig`, or a file, folder or hub name of an ipu_config.json.
            pod_type: Selects from values by pod type in ipu_config, e.g. pod16.
            loss_scaling: Factor of the loss while gradients are computed; null is 1.
            lamb: Use LAMB with the hyperparameters of the AdamW of the module.
            loader_mode: Whether a separate process prefetches batches: sync, async or
                async_rebatched. Random data then needs num_workers above 0 to be reproducible.
            auto_round_num_ipus: Round the number of reserved IPUs up to a power of two.
            compile_only: Compile for a later run on Mk2 IPUs, without any, and exit.
            edit_options: Called with `poptorch.Options` and whether they are for training.
            accelerator: Set by the Trainer, like the next two.
            checkpoint_io: Plugin that reads and writes checkpoints.
            precision_plugin: Precision plugin.

        Raises:
            UserError: If a value is invalid.
        """
        super().__init__(accelerator, None, PoprunEnvironment(), checkpoint_io, precision_plugin)
        enforce([*rank_only_rules(stages_per_rank, schedule), *loss_scaling_rule(loss_scaling)])
        self.num_nodes = 1
        given = plan_fields(locals(), PLAN_FIELDS)
        values = read_values(ipu_config)
        self.ipu_config = IPUConfig.from_dict(values, pod_type, given)
        self._overridden = overridden_fields(given, values, pod_type)
        self._options = RunOptions(
            loss_scaling, lamb, loader_mode, auto_round_num_ipus, compile_only, edit_options
        )
        self._run: Optional[Run] = None
        self._rng_state: Optional[List[int]] = None  # of the last run, for later saves

    @property
    def run(self) -> Run:
        """The current run."""
        assert self._run is not None
        return self._run

    def poptorch_options(self, training: bool) -> object:
        """Return the options of the training or inference program, for a `poptorch.DataLoader`."""
        return program_options(self.ipu_config, training, self._options)

    @property
    def facts(self) -> StrategyFacts:
        """The facts that models and data depend on."""
        return facts_of_ipus(self.ipu_config, self._run)

    @property
    @override
    def root_device(self) -> torch.device:
        return torch.device("cpu")  # holds batches, metrics, and weights between runs

    @property
    def is_distributed(self) -> bool:
        """Whether data is sharded over processes: in training only."""
        trainer = trainer_of(self.lightning_module)
        return self.world_size > 1 and trainer is not None and bool(trainer.training)

    @property
    @override
    def distributed_sampler_kwargs(self) -> Dict[str, object]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def set_world_ranks(self) -> None:
        """Set IPUs as devices, after the Trainer has set everything else."""
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]
        self.accelerator = IPUAccelerator()  # "auto" of Lightning selects another one
        enforce(ipu_limit_rule(self.ipu_config.training))
        enforce(node_rule(self.num_nodes))
        needed = self.ipu_config.training.shape.num_devices
        self.parallel_devices = expand(self.parallel_devices, needed)
        self.precision_plugin = for_ipu(self.precision_plugin)

    @override
    def reduce(self, tensor: object, group: object = None, reduce_op: object = "mean") -> object:
        return tensor  # all processes evaluate all data

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision

    @override
    def barrier(self, name: Optional[str] = None) -> None:
        """Do nothing: PopDist synchronizes processes while they run."""

    @override
    def broadcast(self, obj: object, src: int = 0) -> Any:
        return obj

    @override
    def setup_environment(self) -> None:
        module: Any = self.lightning_module
        self._run = Run(module.trainer, module, self.ipu_config, self._overridden, self._options)

    @override
    def setup(self, trainer: Trainer) -> None:
        self.run.start(self.precision_plugin)
        if trainer.state.fn == TrainerFn.FITTING:
            with one_optimizer():
                self.setup_optimizers(trainer)
            self.run.set_optimizer(self.optimizers, self.lr_scheduler_configs)
        self.setup_precision_plugin()

    @override
    def process_dataloader(self, dataloader: object) -> object:
        return self.run.loader(dataloader, training=bool(self.run.trainer.training))

    @override
    def model_to_device(self) -> None:
        """Do nothing: PopTorch moves the weights when it compiles."""

    @override
    def on_train_start(self) -> None:
        self.run.begin_training()

    @override
    def training_step(self, *args: object, **kwargs: object) -> Any:
        self.run.begin_step()
        return super().training_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        refuse_other_losses(closure_loss)  # gradients are computed together with the loss
        return super().backward(closure_loss, *args, **kwargs)

    @override
    def lightning_module_state_dict(self) -> Dict[str, Any]:
        assert self.lightning_module is not None
        if self._run is not None and self._run.executor is not None:
            self._run.executor.programs.to_host()
        return checkpoints.plain_state(self.lightning_module)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> Dict[str, Any]:
        mine = None if self._run is None else self._run.optimizer
        return super().optimizer_state(optimizer) if mine is None else mine.state_dict()

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self.run.load_optimizer_state(checkpoint)

    @override
    def save_checkpoint(
        self, checkpoint: Dict[str, object], filepath: Any, storage_options: Optional[Any] = None
    ) -> None:
        state = self._rng_state if self._run is None else self._run.rng_state()
        checkpoints.add_ipu_entry(checkpoint, self.ipu_config, state)
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self.is_global_zero:
            checkpoints.save_config_beside(self.ipu_config, filepath)

    @override
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        checkpoint: Dict[str, object] = super().load_checkpoint(*args, **kwargs)
        self.run.read_ipu_entry(checkpoint)
        return checkpoint

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self._run is not None:
            self._run.on_exception(exception)
            if isinstance(exception, KeyboardInterrupt):
                self.teardown()  # Lightning 2.3 does not after Ctrl-C

    @override
    def teardown(self) -> None:
        run, self._run = self._run, None
        try:
            self._rng_state = self._rng_state if run is None else run.close()
        finally:
            super().teardown()  # plugins may have to finish, e.g. a save
