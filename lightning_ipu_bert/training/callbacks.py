"""The default callbacks of our modules."""

from __future__ import annotations

from typing import List

from lightning.pytorch import Callback, Trainer

from lightning_ipu_bert._compat.lightning import callbacks_of
from lightning_ipu_bert.pipeline.facts import facts_of
from lightning_ipu_bert.training.interrupts import SignalsBetweenSteps
from lightning_ipu_bert.training.random_states import RandomStates
from lightning_ipu_bert.training.termination import SaveOnTermination


def missing_callbacks(trainer: Trainer, *others: Callback) -> List[Callback]:
    """Return callbacks for `configure_callbacks`, without those of a type that the Trainer has.

    Args:
        trainer: The module's Trainer.
        others: Callbacks of the module, added to those that apply to any module: random states in
            checkpoints, saving on SIGTERM and Ctrl-C, and signals deferred to the end of a step.
    """
    own = [RandomStates(), SaveOnTermination(), *others]
    if trainer.world_size == 1 and not facts_of(trainer).holds_interrupts:
        own.append(SignalsBetweenSteps())
    callbacks = callbacks_of(trainer)
    present = {type(callback) for callback in callbacks}
    return [callback for callback in own if type(callback) not in present]
