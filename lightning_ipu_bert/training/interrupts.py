"""Signals, including Ctrl-C, that are handled between two steps.

The first Ctrl-C ends a run between two steps, where weights, optimizer state and counters are
consistent and can be saved. A second Ctrl-C ends it immediately without saving.
"""

from __future__ import annotations

import signal
from typing import Callable, List, Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_ipu_bert._compat.lightning import callbacks_of, restore_signal_handlers
from lightning_ipu_bert.training.deferred_signals import DeferredSignals, raise_at_once
from lightning_ipu_bert.training.termination import (
    SaveOnTermination,
    can_be_saved_after,
    cause_of,
    saved_on_exception,
)


def single_process(seen: List[bool]) -> List[bool]:
    """Return the signals that this process has received: there are no other processes."""
    return seen


class SignalsBetweenSteps(Callback):
    """Defers signals until all processes of a run are at the same point between two steps.

    In training this is the start of every batch. The batch is still trained on, so that it is not
    lost, and the run ends after it; on SIGTERM Lightning ends the run, or saves and continues if
    configured so. In evaluation it is every batch too, except those that only some processes have.
    """

    def __init__(
        self,
        end_at_once: Callable[[], None] = raise_at_once,
        numbers: Sequence[int] = (signal.SIGINT,),
        agree: Callable[[List[bool]], List[bool]] = single_process,
        print_hint: bool = True,
        is_common_step: Callable[[], bool] = lambda: True,
    ) -> None:
        """Create the object without replacing any handler.

        Args:
            end_at_once: Called by a second Ctrl-C.
            numbers: The signals.
            agree: Returns the signals that any process has received, given those of this one.
            print_hint: Whether this process prints what a second Ctrl-C does.
            is_common_step: Whether all processes run the current step of an evaluation.
        """
        self._signals = DeferredSignals(end_at_once, print_hint)
        self._numbers = numbers
        self._agree = agree
        self._is_common_step = is_common_step
        self._last_step = False  # after Ctrl-C: the run ends after this step

    # Lightning's own handler of SIGTERM, which communicates, must not run from the first hook on.

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.defer(self._numbers)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.defer(self._numbers)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.defer(self._numbers)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.defer(self._numbers)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.defer(self._numbers)

    @override
    def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
        self._last_step = self._deliver()

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if self._last_step:
            self._signals.interrupt()

    @override
    def on_validation_batch_start(self, trainer: Trainer, *args: object) -> None:
        self._deliver_in_evaluation()

    @override
    def on_test_batch_start(self, trainer: Trainer, *args: object) -> None:
        self._deliver_in_evaluation()

    @override
    def on_predict_batch_start(self, trainer: Trainer, *args: object) -> None:
        self._deliver_in_evaluation()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._deliver_now()  # Lightning itself ends after the validation
        else:
            self._end(trainer)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.release()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Print how to resume from the checkpoint that was saved, or that there is none."""
        self.release()
        if isinstance(exception, KeyboardInterrupt):
            restore_signal_handlers(trainer)
        if not can_be_saved_after(exception):
            return
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        savers = [c for c in callbacks_of(trainer) if isinstance(c, SaveOnTermination)]
        if savers and training:
            return  # prints its own line
        path = saved_on_exception(trainer) if training else ""
        how = f"To resume: ckpt_path={path}" if path else "Nothing was saved."
        rank_zero_info(f"Ended by {cause_of(exception)}. {how}")

    def release(self) -> None:
        """Restore the original handlers."""
        self._signals.release()

    def _deliver_in_evaluation(self) -> None:
        if self._is_common_step():
            self._deliver_now()

    def _end(self, trainer: Trainer) -> None:
        """Handle signals after the last batch, where Lightning no longer checks for them."""
        self._deliver_now()
        if signal.SIGTERM in self._numbers and trainer.received_sigterm:
            raise SIGTERMException

    def _deliver_now(self) -> None:
        if self._deliver():
            self._signals.interrupt()

    def _deliver(self) -> bool:
        """Handle the signals that any process has received; return whether Ctrl-C is one."""
        self._signals.defer(self._numbers)
        votes = self._agree(self._signals.seen(self._numbers))
        seen = [number for number, vote in zip(self._numbers, votes) if vote]
        for number in seen:
            if number != signal.SIGINT:
                self._signals.deliver(number)
        return signal.SIGINT in seen
