"""Offline compilation for a later run, without IPUs."""

from __future__ import annotations

from contextlib import suppress
from typing import Callable

from lightning.pytorch import Trainer

from lightning_ipu_bert._compat.lightning import run_step_on_first_batch


class CompiledOffline(SystemExit):
    """Ends a step after compilation, and the run with exit code 0."""

    def __init__(self) -> None:
        """Create the exception."""
        super().__init__(0)


def compile_and_end(trainer: Trainer) -> None:
    """Compile both programs of `fit`, each by a step of the module, and end the run.

    Args:
        trainer: The Trainer, whose training loader is set up.

    Raises:
        CompiledOffline: Always.
    """
    _step(trainer, trainer.fit_loop, trainer.strategy.training_step)
    if trainer.enable_validation:
        trainer.lightning_module.eval()
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        _step(trainer, trainer.fit_loop.epoch_loop.val_loop, trainer.strategy.validation_step)
    raise CompiledOffline


def _step(trainer: Trainer, loop: object, step: Callable[..., object]) -> None:
    """Run a step on the first batch as in the loops of Lightning, up to the compilation."""
    with suppress(CompiledOffline):
        run_step_on_first_batch(trainer, loop, step)
