"""Lightning: 2.3.3 beside 2.6, and its private names.

Files are relative to https://github.com/Lightning-AI/pytorch-lightning/tree/master/src/lightning.

- `_SubprocessScriptLauncher`, `_MultiProcessingLauncher`, `_call_children_scripts`
  (pytorch/strategies/launchers): every strategy starts its ranks by them. None public in 2.6.
- `_set_num_threads_if_needed`, `_init_dist_connection`,
  `_get_default_process_group_backend_for_device` (fabric/utilities/distributed.py): the same
  process group as Lightning's own strategies have. None public in 2.6.
- `LightningModule._trainer` (pytorch/core/module.py): the public one raises. None public in 2.6.
- `_update_properties`, `_device` (fabric/utilities/device_dtype_mixin.py): `module.device` is
  wrong after a move of single parameters. None public in 2.6.
- `_on_before_batch_transfer` (pytorch/core/module.py): a batch as the loops prepare it. None
  public in 2.6.
- `_update_dataloader` (pytorch/utilities/data.py): a loader of any class with another sampler.
  None public in 2.6.
- `_IndexBatchSamplerWrapper`, `_batch_sampler` (pytorch/overrides/distributed.py): `predict`
  wraps batch samplers. None public in 2.6.
- `ModelCheckpoint._every_n_train_steps` (pytorch/callbacks/model_checkpoint.py): the interval
  must be one of whole calls on IPUs. None public in 2.6.
- `ThroughputMonitor._throughputs` (pytorch/callbacks/throughput_monitor.py): it counts ranks
  instead of replicas. None public in 2.6.
- `_TrainingEpochLoop`, `_batches_that_stepped` (pytorch/loops/training_epoch_loop.py): the step
  of the loggers; whether saves are counted on. The second use ends with Lightning 2.5.
- `_combined_loader` (pytorch/loops): the first batch, to compile for. None public in 2.6.
- `_interrupt`, `Trainer._teardown` (pytorch/trainer/call.py, trainer.py): forked ranks must
  handle Ctrl-C themselves. None public in 2.6.
- `Trainer._signal_connector` (pytorch/trainer/connectors/signal_connector.py): Lightning forgets
  to restore handlers after Ctrl-C. Ends with the SDK stack.
- `LightningCLI._parse_ckpt_path`, `_add_instantiators`, `_parser` (pytorch/cli.py): see
  `PlainCLI`. No option in 2.6.
"""

from __future__ import annotations

import signal
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
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ThroughputMonitor
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.strategies.launchers import (
    _MultiProcessingLauncher,
    _SubprocessScriptLauncher,
)
from lightning.pytorch.trainer.call import _interrupt
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, Sampler
from typing_extensions import override

MultiProcessingLauncher = _MultiProcessingLauncher
SubprocessScriptLauncher = _SubprocessScriptLauncher


def start_scripts(launcher: SubprocessScriptLauncher) -> None:
    """Start the script anew for every other rank of this machine, and nothing else of `launch`."""
    launcher._call_children_scripts()


def set_num_threads(num_processes: int) -> None:
    """Share the cores among the processes of this machine, as Lightning's launchers do."""
    _set_num_threads_if_needed(num_processes=num_processes)


def default_backend(device: torch.device) -> str:
    """Return the backend of torch.distributed for a device (fabric/utilities/distributed.py)."""
    return _get_default_process_group_backend_for_device(device)


def init_process_group(environment: ClusterEnvironment, backend: str, timeout: timedelta) -> None:
    """Create the process group if there is none, with the environment's address and ranks."""
    _init_dist_connection(environment, backend, timeout=timeout)


def trainer_of(module: Optional[LightningModule]) -> Optional[Trainer]:
    """Return a module's Trainer, or None; the public `trainer` raises where there is none."""
    return None if module is None else module._trainer


def datamodule_of(trainer: Trainer) -> Optional[LightningDataModule]:
    """Return a Trainer's data module; the attribute is there only where a run was given one."""
    try:
        datamodule: LightningDataModule = trainer.datamodule  # type: ignore[attr-defined]
    except AttributeError:
        return None
    return datamodule


def set_device(module: LightningModule, device: torch.device) -> None:
    """Let `module.device` name a device. Without it the property is wrong after a move by hand."""
    _update_properties(module, device=device)


@contextmanager
def on_device(module: LightningModule, device: torch.device) -> Iterator[None]:
    """Let `module.device` name another device within the context."""
    before = module._device
    module._device = device
    try:
        yield
    finally:
        module._device = before


def with_sampler(loader: DataLoader[Any], sampler: Sampler[Any]) -> DataLoader[Any]:
    """Return a loader with another sampler, made as Lightning does (pytorch/utilities/data.py)."""
    return _update_dataloader(loader, sampler)


def unwrapped_batch_sampler(sampler: Any) -> Any:
    """Return a user's batch sampler; Lightning wraps it for `predict` to note the indices."""
    if isinstance(sampler, _IndexBatchSamplerWrapper):
        return sampler._batch_sampler
    return sampler


def note_indices(loader: DataLoader[Any], like: DataLoader[Any]) -> None:
    """Let a loader note the indices of its batches for `predict` if another one does so."""
    sampler: Any = loader.batch_sampler
    if isinstance(like.batch_sampler, _IndexBatchSamplerWrapper):
        wrapper = _IndexBatchSamplerWrapper(sampler)
        object.__setattr__(loader, "batch_sampler", wrapper)  # torch guards the attribute


def every_n_train_steps(callback: ModelCheckpoint) -> int:
    """Return the interval of a ModelCheckpoint, which keeps it to itself."""
    return int(callback._every_n_train_steps)


def saves_on_exception(callback: ModelCheckpoint) -> bool:
    """Return whether a ModelCheckpoint saves on exceptions; Lightning before 2.6 cannot."""
    return bool(getattr(callback, "save_on_exception", False))


def throughputs(monitor: ThroughputMonitor) -> List[Throughput]:
    """Return what a ThroughputMonitor measures with, by stage of the Trainer."""
    return list(monitor._throughputs.values())


def log_at_last_update(trainer: Trainer, updates_per_batch: int) -> None:
    """Log what belongs to a batch at the last of its updates, counted from 0.

    Called before the first hook of a batch: callbacks decide there whether they log. Lightning adds
    1 at the end of the batch (pytorch/loops/training_epoch_loop.py).
    """
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped += -(loop._batches_that_stepped + 1) % updates_per_batch


def run_step_on_first_batch(trainer: Trainer, loop: Any, step: Callable[..., Any]) -> None:
    """Run a step on the first batch of a loop, prepared as the loop itself does."""
    batch, _, _ = next(iter(loop._combined_loader))
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    several = trainer.validating and len(loop._combined_loader.flattened) > 1
    step(batch, 0, *([0] if several else []))


def handle_interrupt(trainer: Trainer, exception: BaseException) -> None:
    """Do what Lightning does on an exception (pytorch/trainer/call.py), then tear down.

    Forked ranks need it: Lightning handles exceptions in the process that forked them only.
    """
    _interrupt(trainer, exception)
    trainer._teardown()


def restore_signal_handlers(trainer: Trainer) -> None:
    """Restore the handlers from before the run; Lightning 2.3 forgets to after Ctrl-C.

    Newer ones ignore Ctrl-C while they shut down, and restore the handlers at the end.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        trainer._signal_connector.teardown()


def count_saved_batch(checkpoint: Dict[str, Any]) -> None:
    """Count the batch at whose end a checkpoint was saved; ends with Lightning 2.5.

    Lightning counts a batch as completed after the hooks in which callbacks save. Newer ones make
    up for that when a run is resumed; older ones would train on one batch too many.

    Args:
        checkpoint: What `on_load_checkpoint` is given; changed in place.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    if hasattr(_TrainingEpochLoop, "update_restart_stage") or not loops:
        return
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    if batches["current"]["completed"] != batches["current"]["processed"] - 1:
        return
    for span in ("total", "current"):
        batches[span]["completed"] += 1
        if batches["is_last_batch"]:  # the epoch is done, less its validation, as in newer ones
            epochs[span]["processed"] += 1
            epochs[span]["completed"] += 1
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    logged = loops["epoch_loop.state_dict"]
    logged["_batches_that_stepped"] = max(
        logged["_batches_that_stepped"], steps["total"]["completed"]
    )


class PlainCLI(LightningCLI):
    """LightningCLI without two things that our checkpoints do not want (pytorch/cli.py)."""

    @override
    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning 2.6 lets the checkpoint win over the command line in silence."""

    @override
    def _add_instantiators(self) -> None:
        """Do nothing: our hyperparameters are plain, `load_from_checkpoint` needs no parser."""

    def defaults_of(self, subcommand: str) -> Any:
        """Return the defaults of a subcommand's options."""
        return self._parser(subcommand).get_defaults()
