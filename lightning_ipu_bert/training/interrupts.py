"""Signals, including Ctrl-C, that are handled between two steps.

The first Ctrl-C ends a run between two steps, where weights, optimizer state and counters are
consistent and can be saved. A second Ctrl-C ends it immediately without saving.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Any, Callable, Dict, List, Sequence, Set

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_ipu_bert._compat.lightning import callbacks_of, restore_signal_handlers
from lightning_ipu_bert.training.termination import (
    InterruptedBetweenSteps,
    SaveOnTermination,
    can_be_saved_after,
    cause_of,
    saved_on_exception,
)

SAME_SECONDS = 0.25
"""Signals within this time count as one Ctrl-C: a terminal sends it to all processes of a job, and
launchers forward it to the processes that they started."""
HINT = "\nCtrl-C: the run ends after this step. Press it again to end immediately without saving.\n"


class DeferredSignals:
    """Defers signals until they are delivered explicitly.

    Python runs handlers between any two instructions, so a handler must not modify a run.
    """

    def __init__(self, end_at_once: Callable[[], None], print_hint: bool = True) -> None:
        """Create the object without replacing any handler.

        Args:
            end_at_once: Called by the second Ctrl-C, in its handler.
            print_hint: Whether the first Ctrl-C prints what a second one does.
        """
        self._end_at_once = end_at_once
        self._print_hint = print_hint
        self._previous: Dict[int, Any] = {}
        self._seen: Set[int] = set()
        self._first = 0.0  # when the first Ctrl-C came

    def defer(self, numbers: Sequence[int]) -> None:
        """Replace the handlers of signals, once, except of signals that are ignored.

        A custom handler for Ctrl-C is kept.
        """
        if threading.current_thread() is not threading.main_thread():
            return  # Python installs handlers in the main thread only, and so does Lightning
        for number in numbers:
            handler = signal.getsignal(number)
            if number == signal.SIGINT and handler is not signal.default_int_handler:
                continue
            if callable(handler) and handler != self._record:
                self._previous[number] = handler
                self._seen.discard(number)
                signal.signal(number, self._record)

    def seen(self, numbers: Sequence[int]) -> List[bool]:
        """Return for each signal whether it was received."""
        return [number in self._seen for number in numbers]

    def deliver(self, number: int) -> None:
        """Call the original handler of a signal, if it is deferred."""
        # Once: the launcher sends SIGTERM to other ranks, which have already received it.
        handler = self._previous.pop(number, None)
        if handler is not None:
            handler(number, None)

    def interrupt(self) -> None:
        """End the run as requested by Ctrl-C.

        Raises:
            InterruptedBetweenSteps: Always.
        """
        handler = self._previous.pop(signal.SIGINT, None)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        raise InterruptedBetweenSteps

    def release(self) -> None:
        """Restore the handlers that are still replaced."""
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._record:
                signal.signal(number, handler)
        self._previous.clear()
        self._seen.clear()

    def _record(self, number: int, _: object) -> None:
        if number == signal.SIGINT and number in self._seen:
            if time.monotonic() - self._first > SAME_SECONDS:
                self._end_at_once()
        elif number == signal.SIGINT:
            self._first = time.monotonic()
            if self._print_hint:
                sys.stderr.write(HINT)
        self._seen.add(number)


def raise_at_once() -> None:
    """End a run in a process that may continue, such as a notebook."""
    raise KeyboardInterrupt


def single_process(seen: List[bool]) -> List[bool]:
    """Return the signals that this process has received: there are no other processes."""
    return seen


class SignalsBetweenSteps(Callback):
    """Defers signals until all processes of a run are at the same point between two steps.

    In training this is the start of every batch. The batch is still trained on, so that it is not
    lost, and the run ends after it; on SIGTERM Lightning ends the run, or saves and continues if
    configured so. In evaluation it is every batch too, except with several replicas, which may have
    different numbers of batches: they handle signals at the end.
    """

    def __init__(
        self,
        end_at_once: Callable[[], None] = raise_at_once,
        numbers: Sequence[int] = (signal.SIGINT,),
        agree: Callable[[List[bool]], List[bool]] = single_process,
        print_hint: bool = True,
    ) -> None:
        """Create the object without replacing any handler.

        Args:
            end_at_once: Called by a second Ctrl-C.
            numbers: The signals.
            agree: Returns the signals that any process has received, given those of this one.
            print_hint: Whether this process prints what a second Ctrl-C does.
        """
        self._signals = DeferredSignals(end_at_once, print_hint)
        self._numbers = numbers
        self._agree = agree
        self._last_step = False  # after Ctrl-C: the run ends after this step

    @override
    def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
        self._last_step = self._deliver()

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if self._last_step:
            self._signals.interrupt()

    @override
    def on_validation_batch_start(self, trainer: Trainer, *args: object) -> None:
        self._deliver_in_evaluation(trainer)

    @override
    def on_test_batch_start(self, trainer: Trainer, *args: object) -> None:
        self._deliver_in_evaluation(trainer)

    @override
    def on_predict_batch_start(self, trainer: Trainer, *args: object) -> None:
        self._deliver_in_evaluation(trainer)

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

    def _deliver_in_evaluation(self, trainer: Trainer) -> None:
        sampler_kwargs = trainer.distributed_sampler_kwargs
        if sampler_kwargs is None or sampler_kwargs["num_replicas"] == 1:
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
