"""The state of one run on IPUs: plan, executor, and resources that are released at its end."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_ipu_bert._compat.lightning import callbacks_of
from lightning_ipu_bert.checkpoint_file import IPU_KEY
from lightning_ipu_bert.pipeline.facts import StrategyFacts
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig
from lightning_ipu_bert.pipeline.progress import progress_rules
from lightning_ipu_bert.pipeline.rules import enforce
from lightning_ipu_bert.strategies.ipu.checks import batch_norm_rule, check_sdk, resolve_run
from lightning_ipu_bert.strategies.ipu.console import plan_lines
from lightning_ipu_bert.strategies.ipu.executor import IPUExecutor
from lightning_ipu_bert.strategies.ipu.loaders import ipu_loader
from lightning_ipu_bert.strategies.ipu.optimizer_checks import optimizer_rules
from lightning_ipu_bert.strategies.ipu.precision import IPUPrecision
from lightning_ipu_bert.strategies.ipu.profiling import profiled
from lightning_ipu_bert.strategies.ipu.program.annotations import notice_removed_blocks
from lightning_ipu_bert.strategies.ipu.program.compiler import ProgramCompiler
from lightning_ipu_bert.strategies.ipu.program.offline import CompiledOffline, compile_and_end
from lightning_ipu_bert.strategies.ipu.program.optimizer import IPUOptimizer, OptimizerOptions
from lightning_ipu_bert.strategies.ipu.program.random_state import RandomState
from lightning_ipu_bert.strategies.ipu.run_options import RunOptions, program_options
from lightning_ipu_bert.strategies.ipu.updates import (
    UpdatesOfACall,
    intervals_in_calls,
    schedules_of_every_update,
)
from lightning_ipu_bert.strategies.pipelined import PipelinedModule
from lightning_ipu_bert.training.interrupts import SignalsBetweenSteps


class Run:
    """A fit, validate, test or predict: created in `setup_environment`, dropped in `teardown`."""

    def __init__(
        self,
        trainer: Trainer,
        module: PipelinedModule,
        config: IPUConfig,
        overridden: Mapping[str, Any],
        options: RunOptions,
    ) -> None:
        """Check the run before programs are compiled, and print the plan.

        Args:
            trainer: The Trainer.
            module: The LightningModule.
            config: The configuration.
            overridden: Values that override the IPU config, by name.
            options: Other options of the strategy.

        Raises:
            UserError: If a rule is violated, or PopTorch or IPUs are missing.
        """
        self.trainer = trainer
        self.module = module
        self.config = config
        self.options = options
        self.plan = resolve_run(trainer, module, config, options.auto_round_num_ipus)
        self.executor: Optional[IPUExecutor] = None
        self.loaded: Mapping[str, Any] = {}
        """The IPU entry of a checkpoint."""
        self.failed = False
        """Whether the run has failed: later errors must not hide the first."""
        self._half = False
        """Whether weights are float16."""
        self._updates = UpdatesOfACall(config.device_iterations)
        self._signals = SignalsBetweenSteps()
        self._poptorch_options: Dict[Tuple[bool, bool], object] = {}
        self._batch_sizes: Dict[bool, int] = {}
        self._cleanup = ExitStack()
        check_sdk(config, self.plan, module, options.compile_only)
        for line in plan_lines(config, self.plan, overridden):
            rank_zero_info(line)

    @property
    def optimizer(self) -> Optional[IPUOptimizer]:
        """The optimizer; None before there is an executor."""
        return None if self.executor is None else self.executor.optimizer

    @property
    def compile_seconds(self) -> float:
        """Compilation time of this run so far."""
        return 0.0 if self.executor is None else self.executor.compile_seconds

    def start(self, precision: Precision) -> None:
        """Create the executor; programs are compiled with the first batch."""
        assert isinstance(precision, IPUPrecision)
        precision.convert_module(self.module)
        self._half = precision.half
        self._cleanup.enter_context(profiled(self.config.profile_dir))
        self.executor = self.module.pipeline_executor = IPUExecutor(
            self.module,
            self.config,
            ProgramCompiler(
                self.module, self.config, self.plan, self._options_for, self._batch_sizes.get
            ),
            RandomState(self.loaded),
            offline=self.options.compile_only,
        )
        for part in self.module.modules():  # weights may be loaded into a submodule only
            hook = part.register_load_state_dict_post_hook(self._weights_were_loaded)  # type: ignore[no-untyped-call]
            self._cleanup.callback(hook.remove)
        notice_removed_blocks(self.module)
        if self.plan.training is not None:
            replicas = self.plan.training.batches.replication_factor
            enforce(batch_norm_rule(self.module, replicas, self._options_for(True)))
        self._cleanup.enter_context(intervals_in_calls(self.trainer, self.config.device_iterations))
        callbacks = callbacks_of(self.trainer)
        callbacks.insert(0, self._updates)
        self._cleanup.callback(callbacks.remove, self._updates)
        if self.trainer.world_size == 1:
            callbacks.append(self._signals)
            self._cleanup.callback(callbacks.remove, self._signals)
        if self.options.compile_only:
            self.trainer.num_sanity_val_steps = 0

    def _weights_were_loaded(self, *_: object) -> None:
        if self.executor is not None:
            self.executor.programs.versions.host_changed()

    def read_ipu_entry(self, checkpoint: Mapping[str, Any]) -> None:
        """Read the IPU entry of a checkpoint, if it has one.

        Raises:
            UserError: If its counters of batches and updates do not fit this run.
        """
        self.loaded = checkpoint.get(IPU_KEY) or {}
        if self.trainer.state.fn == TrainerFn.FITTING:
            enforce(progress_rules(checkpoint, self.config.device_iterations))

    def set_optimizer(self, optimizers: Sequence[Optimizer], schedules: Sequence[object]) -> None:
        """Set the optimizer and the learning rate schedules of the module.

        Args:
            optimizers: Optimizers of the module.
            schedules: `LRSchedulerConfig`s of Lightning; modified in place.

        Raises:
            UserError: If IPUs do not support them.
        """
        clip = float(self.trainer.gradient_clip_val or 0.0)
        enforce(optimizer_rules(optimizers, self.module, clip, self.options.lamb))
        options = OptimizerOptions(
            half_accumulators=self._half,
            half_momentum=self.config.enable_half_first_order_momentum,
            loss_scaling=self.options.loss_scaling,
            max_grad_norm=clip or None,
            lamb=self.options.lamb,
        )
        assert self.executor is not None
        self.executor.optimizer = IPUOptimizer(optimizers[0], self.module, options)
        iterations = self.config.device_iterations
        self._updates.schedulers = schedules_of_every_update(schedules, iterations)

    def load_optimizer_state(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizer state from a checkpoint of any strategy."""
        assert self.optimizer is not None
        self.optimizer.load_state_dict(checkpoint["optimizer_states"][0])

    def begin_training(self) -> None:
        """Compile and exit, with compile_only."""
        if self.options.compile_only:
            compile_and_end(self.trainer)

    def begin_step(self) -> None:
        """Start a training step, which may update the weights once."""
        assert self.executor is not None
        self.executor.ran_in_step = False

    def loader(self, loader: object, training: bool) -> object:
        """Return a loader whose batches are those of one call of the IPUs."""
        result = ipu_loader(
            loader,
            self._options_for(training, returns_output=not training),
            self.config.training if training else self.config.inference,
            self.config.gradient_accumulation_steps,
            self.options.loader_mode,
        )
        size = getattr(result, "combinedBatchSize", None)  # of poptorch.DataLoader only
        if size:
            self._batch_sizes[training] = max(size, self._batch_sizes.get(training, 0))
        return result

    def _options_for(self, training: bool, returns_output: bool = False) -> object:
        key = (training, returns_output)
        if key not in self._poptorch_options:
            folder = self._cleanup.enter_context(TemporaryDirectory(prefix="ipu-initializers-"))
            file = str(Path(folder) / "initializers.onnx")
            options = program_options(self.config, training, self.options, file, returns_output)
            self._poptorch_options[key] = options
        return self._poptorch_options[key]

    def rng_state(self) -> Optional[List[int]]:
        """Return the random state of the IPUs, or None."""
        return self.loaded.get("rng_state") if self.executor is None else self.executor.rng_state()

    def on_exception(self, exception: BaseException) -> None:
        """Mark the run as failed."""
        self.failed = True
        if isinstance(exception, CompiledOffline):
            rank_zero_info("Compiled; nothing was run because compile_only is set.")

    def close(self) -> Optional[List[int]]:
        """Copy weights and optimizer state to the host, and release the IPUs.

        Returns:
            The random state of the IPUs, or None.
        """
        self.module.pipeline_executor = None
        self._signals.release()
        try:
            with self._cleanup:
                if self.executor is None:
                    return None
                self._cleanup.callback(self.executor.destroy)
                state = self.executor.rng_state()
                if self.executor.optimizer is not None:
                    self.executor.optimizer.release()
                return state
        except Exception as error:
            if not self.failed:
                raise
            rank_zero_warn(f"Releasing the IPUs failed: {error}")
            return None


def facts_of_ipus(config: IPUConfig, run: Optional[Run]) -> StrategyFacts:
    """Return the facts that models and data depend on, in a run or before it."""
    return StrategyFacts(
        micro_batches_per_batch=config.gradient_accumulation_steps,
        updates_per_batch=config.device_iterations,
        static_shapes=True,
        compile_seconds=0.0 if run is None else run.compile_seconds,
        holds_interrupts=True,
    )
