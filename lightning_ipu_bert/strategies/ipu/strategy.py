"""`IPUStrategy`: the same stages, replicas and accumulation on Graphcore IPUs, through PopTorch."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict, List, Optional, Union

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.pipeline.ipu_config import SPELLINGS, IPUConfig, resolved
from lightning_ipu_bert.strategies.ipu import checks
from lightning_ipu_bert.strategies.ipu.config_file import read_values
from lightning_ipu_bert.strategies.ipu.console import flags_without_ipus, plan_lines
from lightning_ipu_bert.strategies.ipu.executor import IPUExecutor
from lightning_ipu_bert.strategies.ipu.hardware import check_hardware, check_poprun
from lightning_ipu_bert.strategies.ipu.loaders import LoaderMode, ipu_loader
from lightning_ipu_bert.strategies.ipu.losses import refuse_other_losses
from lightning_ipu_bert.strategies.ipu.offline import CompiledOffline, compile_and_end
from lightning_ipu_bert.strategies.ipu.optimizer import Extras, IPUOptimizer
from lightning_ipu_bert.strategies.ipu.options import Surroundings, ipu_options
from lightning_ipu_bert.strategies.ipu.precision import IPUPrecision
from lightning_ipu_bert.strategies.ipu.profiling import profiled
from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch
from lightning_ipu_bert.strategies.ipu.states import IPUStates
from lightning_ipu_bert.strategies.ipu.updates import (
    add_updates,
    log_as_last_update,
    schedules_of_every_update,
)


class IPUStrategy(IPUStates):
    """Runs a module's blocks as stages on IPUs; one process owns all that its replicas need.

    The fields of the plan are those of `PipelineParallelStrategy`, so that a config moves between
    them by its class_path; what only IPUs know is in `ipu_config`.
    """

    strategy_name = "ipu_pipeline"
    static_shapes = True
    """Programs take batches of one shape: loaders pad all examples to one length."""

    def __init__(
        self,
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
        parallel_devices: Optional[List[torch.device]] = None,
        cluster_environment: Optional[ClusterEnvironment] = None,
        checkpoint_io: Optional[CheckpointIO] = None,
        precision_plugin: Optional[Precision] = None,
    ) -> None:
        """Create the strategy; nothing of it needs an IPU yet.

        Args:
            layers_per_stage: See `PipelineConfig`, as for the next five. Where null, `ipu_config`
                decides.
            replication_factor: Copies of the pipeline that train.
            gradient_accumulation_steps: Micro-batches of a replica between two weight updates.
            recompute_checkpoint_every_layer: Keep only the outputs of layers.
            replicated_tensor_sharding: Split the optimizer's state over the replicas.
            optimizer_state_offchip: Keep the optimizer's state in the memory beside the IPUs.
            stages_per_rank: 1: an IPU holds one stage.
            schedule: 1f1b, the only one that PopTorch has.
            ipu_config: Fields of `IPUConfig`, or a file, folder or hub name of an ipu_config.json.
            pod_type: Which values to take where ipu_config has them by type of pod, e.g. pod16.
            loss_scaling: Factor of the loss while gradients are computed; 1 where null.
            lamb: Train with LAMB, with the numbers of the module's AdamW.
            loader_mode: Whether batches are made ahead in a process of their own: sync, async or
                async_rebatched. Data that draw random numbers there want num_workers of 1 or more
                to repeat them.
            auto_round_num_ipus: Take more IPUs than are used where their number is no power of two.
            compile_only: Compile for the next run on Mk2 IPUs, without any, and end.
            edit_options: Is called with each `poptorch.Options`, and True for training's, before it
                is used; for what IPUConfig does not know.
            accelerator: Set by the Trainer, as the next four.
            parallel_devices: The IPUs.
            cluster_environment: Not used.
            checkpoint_io: How checkpoints are written.
            precision_plugin: How numbers are represented.

        Raises:
            UserError: If the plan breaks a rule.
        """
        checks.check_shape_of_plan(stages_per_rank, schedule)
        given = read_values(ipu_config)
        plan = {
            "layers_per_stage": layers_per_stage,
            "replication_factor": replication_factor,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "recompute_checkpoint_every_layer": recompute_checkpoint_every_layer,
            "replicated_tensor_sharding": replicated_tensor_sharding,
            "optimizer_state_offchip": optimizer_state_offchip,
        }
        self.ipu_config = IPUConfig.from_dict(given, pod_type, plan)
        """How the model runs on IPUs."""
        self.num_ipus = self.ipu_config.training.num_ipus
        super().__init__(
            accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin
        )
        self._loss_scaling = loss_scaling
        self._lamb = lamb
        self._loader_mode: LoaderMode = loader_mode
        self._auto_round = auto_round_num_ipus
        self._compile_only = compile_only
        self._edit_options = edit_options
        self._options: Dict[bool, Any] = {}
        self._batch_sizes: Dict[bool, int] = {}
        self._every_update: List[Any] = []
        self._failed = False
        self._cleanup = ExitStack()
        self._plan = plan
        of_config = resolved(given, pod_type)
        self._overridden = {
            name: value
            for name, value in plan.items()
            if value is not None and of_config.get(SPELLINGS.get(name, name), value) != value
        }

    # --- what Lightning asks ----------------------------------------------------------------------

    @property
    def config(self) -> PipelineConfig:
        """The plan, as every pipeline has it."""
        return self.ipu_config.plan

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches in a batch of a loader."""
        return self.ipu_config.gradient_accumulation_steps

    @property
    def updates_per_batch(self) -> int:
        """Weight updates of one call: `device_iterations`."""
        return self.ipu_config.device_iterations

    @property
    def compile_seconds(self) -> float:
        """Time spent on compiling in this run."""
        return self._executor.compile_seconds if self._executor is not None else 0.0

    # --- before the run ---------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Check everything that can be checked before programs are compiled, and say the plan."""
        self.set_world_ranks()
        assert self.lightning_module is not None
        module, trainer = self.lightning_module, self.lightning_module.trainer
        graphs = checks.graphs_of(trainer, self.ipu_config)
        checks.check_graphs(graphs, module, self._auto_round)
        self._check_devices()
        if trainer.state.fn == TrainerFn.FITTING:
            checks.check_trainer(trainer, module, self.ipu_config)
        if self._compile_only:
            trainer.num_sanity_val_steps = 0
        import_poptorch(flags_without_ipus(self.config, self._plan))
        check_poprun(self.ipu_config)
        if not self._compile_only:
            check_hardware(max(graph.num_ipus for graph in graphs))
        for line in plan_lines(self.ipu_config, module, self._overridden):
            rank_zero_info(line)

    def setup(self, trainer: Trainer) -> None:
        """Prepare what runs the module; programs are compiled with the first batch."""
        module: Any = self.lightning_module
        self._failed = False
        self.precision_plugin.convert_module(module)
        self._cleanup.enter_context(profiled(self.ipu_config.profile_dir))
        self._executor = module._executor = IPUExecutor(
            module,
            self.ipu_config,
            self._options_for,
            lambda training: self._batch_sizes.get(training),
            offline=self._compile_only,
        )
        for part in module.modules():  # somebody may load weights into a part only
            hook = part.register_load_state_dict_post_hook(self._weights_were_loaded)
            self._cleanup.callback(hook.remove)
        self._executor.loaded_rng_state = self._loaded.get("rng_state")
        self._executor.loaded_num_ipus = self._loaded.get("num_ipus")
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            self._setup_ipu_optimizer(trainer)
            self._every_update = schedules_of_every_update(
                self.lr_scheduler_configs, self.updates_per_batch
            )
        self.setup_precision_plugin()

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Create the module's optimizer and schedules."""
        try:
            super().setup_optimizers(trainer)
        except RuntimeError as error:
            if "multiple optimizers" in str(error):  # Lightning's own words
                raise UserError(checks.SEVERAL_OPTIMIZERS) from error
            raise

    def _setup_ipu_optimizer(self, trainer: Trainer) -> None:
        half = isinstance(self.precision_plugin, IPUPrecision) and self.precision_plugin.half
        clip = trainer.gradient_clip_val or 0.0
        assert self.lightning_module is not None
        module = self.lightning_module
        optimizer = checks.check_optimizers(self.optimizers, module, float(clip), self._lamb)
        extras = Extras(
            half_accumulators=half,
            half_momentum=self.ipu_config.enable_half_first_order_momentum,
            loss_scaling=self._loss_scaling,
            max_grad_norm=float(clip) or None,
            lamb=self._lamb,
        )
        assert self._executor is not None
        self._executor.optimizer = IPUOptimizer(optimizer, module, extras)

    def _options_for(self, training: bool) -> Any:
        if training not in self._options:
            folder = self._cleanup.enter_context(TemporaryDirectory(prefix="ipu-initializers-"))
            seed = os.environ.get("PL_GLOBAL_SEED")
            options = ipu_options(
                self.ipu_config,
                training,
                Surroundings(
                    seed=int(seed) if seed else None,
                    initializers_file=str(Path(folder) / "initializers.onnx"),
                    offline=self._compile_only,
                    auto_round_num_ipus=self._auto_round,
                ),
            )
            if self._edit_options is not None:
                self._edit_options(options, training)
            self._options[training] = options
        return self._options[training]

    def process_dataloader(self, dataloader: object) -> object:
        """Return a loader whose batches are what one call of the IPUs takes."""
        trainer = getattr(self.lightning_module, "_trainer", None)
        training = trainer is not None and bool(trainer.training)
        graph = self.ipu_config.training if training else self.ipu_config.inference
        loader = ipu_loader(
            dataloader,
            self._options_for(training),
            graph,
            self.gradient_accumulation_steps,
            self._loader_mode,
        )
        size = getattr(loader, "combinedBatchSize", None)
        if size:
            self._batch_sizes[training] = max(size, self._batch_sizes.get(training, 0))
        return loader

    def model_to_device(self) -> None:
        """Do nothing: PopTorch moves the weights when it compiles."""

    def _check_devices(self) -> None:
        given = len(self.parallel_devices or [])
        needed = self.ipu_config.training.num_ipus
        if given and given != needed and not self._auto_round:
            raise UserError(
                f"devices={given} does not fit {self.config.num_stages} stages x "
                f"replication_factor={self.config.replication_factor}. Set devices to {needed}, "
                "leave it out, or change the plan."
            )

    def batch_to_device(
        self, batch: Any, device: Optional[torch.device] = None, dataloader_idx: int = 0
    ) -> Any:
        """Leave a batch on the host; of training's, say at which step it is logged."""
        assert self.lightning_module is not None
        if self.lightning_module.trainer.training:
            log_as_last_update(self.lightning_module.trainer, self.updates_per_batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    # --- steps ------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Say how many updates there will be; or compile and end, if nothing else is asked for."""
        module: Any = self.lightning_module
        trainer = module.trainer
        if trainer.estimated_stepping_batches != float("inf"):
            rank_zero_info(f"Total optimization steps: {module.estimated_updates():,}")
        if self.updates_per_batch > 1:
            rank_zero_info(
                f"device_iterations={self.updates_per_batch}: a batch is so many updates. Where a "
                "schedule needs its length, use self.estimated_updates(), and not "
                "trainer.estimated_stepping_batches, which counts batches."
            )
        if self._compile_only:
            compile_and_end(trainer)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own training_step; its `run_loss` runs the IPUs."""
        assert self._executor is not None
        self._executor.ran_in_step = False
        return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call the hooks around `backward`; gradients were computed with the loss."""
        refuse_other_losses(closure_loss)
        return super().backward(closure_loss, *args, **kwargs)

    def _weights_were_loaded(self, module: Any, keys: Any) -> None:
        if self._executor is not None:
            self._executor.weights_were_loaded()

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Optional[Union[LightningModule, Module]] = None,
        **kwargs: Any,
    ) -> Any:
        """Run one call, which updates the weights; count all its updates."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        assert self.lightning_module is not None
        more = self.updates_per_batch - 1
        if more:
            # Once more: a training_step that takes a dataloader_iter has its batch only now.
            log_as_last_update(self.lightning_module.trainer, self.updates_per_batch)
            add_updates(self.lightning_module.trainer, more)
            for scheduler in self._every_update * more:
                scheduler.step()
        return result

    # --- after the run ----------------------------------------------------------------------------

    def teardown(self) -> None:
        """Give the trained weights back to the module, and the IPUs to others."""
        module: Any = self.lightning_module
        executor, self._executor = self._executor, None
        if module is not None:
            module._executor = None
        self._options, self._batch_sizes, self._loaded = {}, {}, {}
        try:
            with self._cleanup:
                if executor is not None:
                    self._cleanup.callback(executor.destroy)
                    self._last_rng_state = executor.rng_state()
                    if executor.optimizer is not None:
                        executor.optimizer.give_back()
        except Exception as error:
            if not self._failed:
                raise
            rank_zero_warn(f"The IPUs could not be given back in order: {error}")
        finally:
            super().teardown()  # plugins may have something to finish, such as a save

    def on_exception(self, exception: BaseException) -> None:
        """Remember that the run has failed: what fails after it must not hide why."""
        if isinstance(exception, CompiledOffline):
            rank_zero_info("Nothing was run: compile_only is set. Run again without it.")
        self._failed = True
