"""Lightning: differences between 2.3.3 and 2.6, and private names.

Files are relative to https://github.com/Lightning-AI/pytorch-lightning/tree/master/src/lightning.

- `_SubprocessScriptLauncher`, `_MultiProcessingLauncher`, `_call_children_scripts`
  (pytorch/strategies/launchers): every strategy launches its ranks with them. No public API in 2.6.
- `_set_num_threads_if_needed`, `_init_dist_connection`,
  `_get_default_process_group_backend_for_device` (fabric/utilities/distributed.py): the same
  process group as in Lightning's own strategies. No public API in 2.6.
- `LightningModule._trainer` (pytorch/core/module.py): the public one raises. No public API in 2.6.
- `LightningModule._current_fx_name` (pytorch/core/module.py): the hook that is running; at the
  end of an epoch Lightning combines logged values outside of hooks. No public API in 2.6.
- `_update_properties`, `_device` (fabric/utilities/device_dtype_mixin.py): `module.device` is
  wrong after a move of single parameters. No public API in 2.6.
- `_on_before_batch_transfer` (pytorch/core/module.py): a batch as the loops prepare it. No
  public API in 2.6.
- `ParallelStrategy._layer_sync` (pytorch/strategies/parallel.py): whether `sync_batchnorm` was
  passed to the Trainer. No public API in 2.6.
- `_validate_multiple_optimizers_support` (pytorch/core/optimizer.py): where an error was raised.
  No public API in 2.6.
- `ModelCheckpoint._every_n_train_steps` (pytorch/callbacks/model_checkpoint.py): the interval
  must be divisible by the updates of a call on IPUs. No public API in 2.6.
- `ThroughputMonitor._throughputs` (pytorch/callbacks/throughput_monitor.py): it counts ranks
  instead of replicas. No public API in 2.6.
- `_TrainingEpochLoop`, `_batches_that_stepped` (pytorch/loops/training_epoch_loop.py): the step
  of the loggers, and how saved batches are counted. The latter ends with Lightning 2.5.
- `_combined_loader` (pytorch/loops): the first batch, for compilation. No public API in 2.6.
- `_interrupt`, `Trainer._teardown` (pytorch/trainer/call.py, trainer.py): forked ranks must
  handle Ctrl-C themselves. No public API in 2.6.
- `Trainer._signal_connector` (pytorch/trainer/connectors/signal_connector.py): Lightning 2.3
  does not restore handlers after Ctrl-C. Ends with the SDK stack.
- `LightningCLI._parse_ckpt_path`, `_add_instantiators`, `_parser` (pytorch/cli.py): see
  `PlainCLI`. No option in 2.6.
"""

from __future__ import annotations

import signal
import traceback
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _set_num_threads_if_needed,
)
from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ThroughputMonitor
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.optimizer import _validate_multiple_optimizers_support
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import (
    _MultiProcessingLauncher,
    _SubprocessScriptLauncher,
)
from lightning.pytorch.trainer.call import _interrupt
from typing_extensions import override

MultiProcessingLauncher = _MultiProcessingLauncher
SubprocessScriptLauncher = _SubprocessScriptLauncher


def start_scripts(launcher: SubprocessScriptLauncher) -> None:
    """Run the script again for every other rank on this machine, without the rest of `launch`."""
    launcher._call_children_scripts()


def set_num_threads(num_processes: int) -> None:
    """Divide the cores among the processes on this machine, as Lightning's launchers do."""
    _set_num_threads_if_needed(num_processes=num_processes)


def default_backend(device: torch.device) -> str:
    """Return the backend of torch.distributed for a device (fabric/utilities/distributed.py)."""
    return _get_default_process_group_backend_for_device(device)


def init_process_group(environment: ClusterEnvironment, backend: str, timeout: timedelta) -> None:
    """Initialize the process group from the environment, unless it is already initialized."""
    _init_dist_connection(environment, backend, timeout=timeout)


def trainer_of(module: Optional[LightningModule]) -> Optional[Trainer]:
    """Return the Trainer of a module or None; the public `trainer` raises if there is none."""
    return None if module is None else module._trainer


def is_in_batch(module: LightningModule) -> bool:
    """Return whether a step, or a hook at the start or end of a batch, is running."""
    hook = module._current_fx_name or ""
    return hook.endswith("_step") or "_batch_" in hook


def callbacks_of(trainer: Trainer) -> List[Callback]:
    """Return the list of callbacks of a Trainer, which sets it in a helper, unseen by mypy."""
    found: List[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


def datamodule_of(trainer: Trainer) -> Optional[LightningDataModule]:
    """Return the data module of a Trainer or None; the attribute exists only if one was passed."""
    try:
        datamodule: LightningDataModule = trainer.datamodule  # type: ignore[attr-defined]
    except AttributeError:
        return None
    return datamodule


def set_device(module: LightningModule, device: torch.device) -> None:
    """Set `module.device`, which is wrong after single parameters have been moved."""
    _update_properties(module, device=device)


@contextmanager
def on_device(module: LightningModule, device: torch.device) -> Iterator[None]:
    """Set `module.device` within the context."""
    before = module._device
    module._device = device
    try:
        yield
    finally:
        module._device = before


def synchronizes_batch_norm(strategy: object) -> bool:
    """Return whether `Trainer(sync_batchnorm=True)` was passed."""
    return isinstance(strategy, ParallelStrategy) and strategy._layer_sync is not None


def rejects_several_optimizers(error: RuntimeError) -> bool:
    """Return whether an error is the one of Lightning about several optimizers."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return last.f_code is _validate_multiple_optimizers_support.__code__


def every_n_train_steps(callback: ModelCheckpoint) -> int:
    """Return the interval of a ModelCheckpoint in training steps, which has no public attribute."""
    return int(callback._every_n_train_steps)


def saves_on_exception(callback: ModelCheckpoint) -> bool:
    """Return whether a ModelCheckpoint saves on exceptions; Lightning before 2.6 does not."""
    return bool(getattr(callback, "save_on_exception", False))


def throughputs(monitor: ThroughputMonitor) -> List[Throughput]:
    """Return the Throughput objects of a ThroughputMonitor."""
    return list(monitor._throughputs.values())


def log_at_last_update(trainer: Trainer, updates_per_batch: int) -> None:
    """Log the metrics of a batch at the last of its updates, counted from 0.

    Must be called before the first hook of a batch, in which callbacks decide whether they log.
    Lightning adds 1 at the end of the batch (pytorch/loops/training_epoch_loop.py).
    """
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped += -(loop._batches_that_stepped + 1) % updates_per_batch


def run_step_on_first_batch(trainer: Trainer, loop: Any, step: Callable[..., Any]) -> None:
    """Run a step on the first batch of a loop, prepared as by the loop itself."""
    batch, _, _ = next(iter(loop._combined_loader))
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    several = trainer.validating and len(loop._combined_loader.flattened) > 1
    step(batch, 0, *([0] if several else []))


def handle_interrupt(trainer: Trainer, exception: BaseException) -> None:
    """Handle an exception as Lightning does (pytorch/trainer/call.py), then tear down.

    Required in forked ranks: Lightning handles exceptions only in the process that forked them.
    """
    _interrupt(trainer, exception)
    trainer._teardown()


def restore_signal_handlers(trainer: Trainer) -> None:
    """Restore the signal handlers from before the run, which Lightning 2.3 omits after Ctrl-C.

    Newer versions ignore Ctrl-C while they shut down, and restore the handlers at the end.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        trainer._signal_connector.teardown()


def count_saved_batch(checkpoint: Dict[str, Any]) -> None:
    """Count the batch at whose end a checkpoint was saved; ends with Lightning 2.5.

    Lightning counts a batch as completed after the hooks in which callbacks save. Newer versions
    correct this when a run is resumed; older versions would repeat one batch.

    Args:
        checkpoint: The argument of `on_load_checkpoint`; modified in place.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    if hasattr(_TrainingEpochLoop, "update_restart_stage") or not loops:
        return
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    if batches["current"]["completed"] != batches["current"]["processed"] - 1:
        return
    for span in ("total", "current"):
        batches[span]["completed"] += 1
        if batches["is_last_batch"]:  # the epoch is complete except for its validation
            epochs[span]["processed"] += 1
            epochs[span]["completed"] += 1
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    logged = loops["epoch_loop.state_dict"]
    logged["_batches_that_stepped"] = max(
        logged["_batches_that_stepped"], steps["total"]["completed"]
    )


class PlainCLI(LightningCLI):
    """LightningCLI without two features that conflict with our checkpoints (pytorch/cli.py)."""

    @override
    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning 2.6 lets the checkpoint silently override the command line."""

    @override
    def _add_instantiators(self) -> None:
        """Do nothing: hyperparameters are plain values, `load_from_checkpoint` needs no parser."""

    def defaults_of(self, subcommand: str) -> object:
        """Return the defaults of the options of a subcommand."""
        return self._parser(subcommand).get_defaults()
