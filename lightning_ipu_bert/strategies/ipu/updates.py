"""One call of the IPUs may be several weight updates; Lightning counts calls.

With `device_iterations` D a call is D updates: `global_step`, what is logged under it, and learning
rate schedules go on by D. The learning rate of a call is that of its first update.
"""

from __future__ import annotations

from typing import Any, List, Sequence

from lightning_ipu_bert.errors import UserError


def schedules_of_every_update(schedules: Sequence[Any], updates_per_batch: int) -> List[Any]:
    """Return the schedulers that step with every update; let the others count calls.

    Args:
        schedules: Lightning's `LRSchedulerConfig`s, with frequencies in updates; changed in place.
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
        calls, rest = divmod(schedule.frequency, updates_per_batch)
        if rest:
            raise UserError(
                f"A learning rate schedule has frequency={schedule.frequency} updates, which "
                f"device_iterations={updates_per_batch} does not divide. Use 1 or a multiple of it."
            )
        schedule.frequency = calls
    return every_update


def log_as_last_update(trainer: Any, updates_per_batch: int) -> None:
    """Let what is logged about a batch stand at the last of its updates, counted from 0.

    Called before the first hook of a batch: callbacks decide there whether they log. Lightning adds
    1 at the end of the batch.
    """
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped += -(loop._batches_that_stepped + 1) % updates_per_batch


def add_updates(trainer: Any, more: int) -> None:
    """Count the updates of a call behind its first, which Lightning counts itself."""
    step = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
    for progress in (step.total, step.current):
        progress.ready += more
        progress.completed += more
