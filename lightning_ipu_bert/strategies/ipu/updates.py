"""Counting of weight updates: one call of the IPUs may be several updates; Lightning counts calls.

With `device_iterations` D a call is D updates: `global_step`, its logged metrics and learning rate
schedules advance by D. All updates of a call use the learning rate of the first.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator, List, Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_ipu_bert._compat.lightning import log_at_last_update
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.strategies.ipu.checks import is_dev_run


class UpdatesOfACall(Callback):
    """Counts the updates of every call; the strategy adds it before all other callbacks."""

    def __init__(self, updates_per_call: int) -> None:
        """Create the callback.

        Args:
            updates_per_call: `device_iterations`.
        """
        self.schedulers: List[Any] = []
        """Learning rate schedulers that step after every update."""
        self._updates = updates_per_call

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Print the total number of updates."""
        if trainer.estimated_stepping_batches != float("inf"):
            rank_zero_info(f"Total optimization steps: {pl_module.estimated_updates():,}")
        if self._updates > 1:
            rank_zero_info(
                f"With device_iterations={self._updates} a batch is {self._updates} updates. "
                "For the length of a schedule use self.estimated_updates() instead of "
                "trainer.estimated_stepping_batches, which counts batches."
            )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Log the metrics of the batch at its last update."""
        log_at_last_update(trainer, self._updates)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Count the updates after the first one, which Lightning counts itself."""
        more = self._updates - 1
        step = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        for progress in (step.total, step.current):
            progress.ready += more
            progress.completed += more
        for scheduler in self.schedulers * more:
            scheduler.step()


@contextmanager
def intervals_in_calls(trainer: Trainer, updates_per_call: int) -> Iterator[None]:
    """Let Lightning's defaults mean calls within the context.

    `log_every_n_steps` is rounded up to whole calls, and `fast_dev_run` counts calls.

    Args:
        trainer: The Trainer, whose settings are restored.
        updates_per_call: `device_iterations`.
    """
    settings: Any = trainer
    every, loop = settings.log_every_n_steps, trainer.fit_loop.epoch_loop
    max_steps = loop.max_steps
    settings.log_every_n_steps = -(-every // updates_per_call) * updates_per_call
    if settings.log_every_n_steps != every and trainer.loggers:
        rank_zero_info(
            f"log_every_n_steps={every} is rounded up to {settings.log_every_n_steps}, a multiple "
            f"of device_iterations={updates_per_call}."
        )
    if is_dev_run(trainer):
        loop.max_steps *= updates_per_call
    try:
        yield
    finally:
        settings.log_every_n_steps = every
        loop.max_steps = max_steps


def schedules_of_every_update(schedules: Sequence[Any], updates_per_batch: int) -> List[object]:
    """Return the schedulers that step after every update; let the others count calls.

    Args:
        schedules: `LRSchedulerConfig`s with frequencies in updates; modified in place.
        updates_per_batch: Updates of a call.

    Raises:
        UserError: If a schedule would have to step in the middle of a call.
    """
    every_update = []
    for schedule in schedules:
        if schedule.interval != "step" or schedule.reduce_on_plateau:
            continue
        if schedule.frequency == 1:
            every_update.append(schedule.scheduler)
            continue
        calls, remainder = divmod(schedule.frequency, updates_per_batch)
        if remainder:
            raise UserError(
                f"A learning rate schedule has frequency={schedule.frequency} updates, which must "
                f"be divisible by device_iterations={updates_per_batch}. Use 1 or a multiple of it."
            )
        schedule.frequency = calls
    return every_update
