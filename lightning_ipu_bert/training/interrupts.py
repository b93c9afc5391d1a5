"""Signals that take effect between two steps, Ctrl-C among them.

The first Ctrl-C ends a run at the next place between two steps, where weights, optimizer state and
counters fit together and can be saved. A second one ends it at once, and nothing is saved.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Any, Callable, Dict, List, Sequence, Set

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_ipu_bert._compat.lightning import restore_signal_handlers, saves_on_exception
from lightning_ipu_bert.training.termination import (
    InterruptedBetweenSteps,
    SaveOnTermination,
    ends_in_order,
)

SAME_SECONDS = 0.25
"""What comes within this time is the same Ctrl-C: a terminal sends it to all processes of a job,
and a process that has started others passes it on to them."""
HINT = "\nCtrl-C: the run ends after this step. Once more ends it at once, and saves nothing.\n"


class HeldSignals:
    """Keeps signals back until somebody asks for them.

    Python runs handlers between any two instructions, so that a handler must not touch a run.
    """

    def __init__(self, end_at_once: Callable[[], None], tell: bool = True) -> None:
        """Hold nothing yet.

        Args:
            end_at_once: Is called by the second Ctrl-C, in its handler.
            tell: Whether the first Ctrl-C says what a second one does.
        """
        self._end_at_once = end_at_once
        self._tell = tell
        self._previous: Dict[int, Any] = {}
        self._seen: Set[int] = set()
        self._first = 0.0  # when the first Ctrl-C came

    def hold(self, numbers: Sequence[int]) -> None:
        """Take the place of the handlers of signals, once; others must not have ignored them.

        Who has a handler of their own for Ctrl-C keeps it.
        """
        if threading.current_thread() is not threading.main_thread():
            return  # where Python lets nobody install handlers, nor does Lightning
        for number in numbers:
            handler = signal.getsignal(number)
            if number == signal.SIGINT and handler is not signal.default_int_handler:
                continue
            if callable(handler) and handler != self._note:
                self._previous[number] = handler
                self._seen.discard(number)
                signal.signal(number, self._note)

    def seen(self, numbers: Sequence[int]) -> List[bool]:
        """Return which of some signals have come."""
        return [number in self._seen for number in numbers]

    def deliver(self, number: int) -> None:
        """Let a signal take effect: call its own handler, if it is held."""
        # Once: Lightning's launcher sends SIGTERM to the other ranks, which know already.
        handler = self._previous.pop(number, None)
        if handler is not None:
            handler(number, None)

    def interrupt(self) -> None:
        """Let Ctrl-C take effect.

        Raises:
            InterruptedBetweenSteps: Always.
        """
        handler = self._previous.pop(signal.SIGINT, None)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        raise InterruptedBetweenSteps

    def release(self) -> None:
        """Put the handlers back that are still replaced."""
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._previous.clear()
        self._seen.clear()

    def _note(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and number in self._seen:
            if time.monotonic() - self._first > SAME_SECONDS:
                self._end_at_once()
        elif number == signal.SIGINT:
            self._first = time.monotonic()
            if self._tell:
                sys.stderr.write(HINT)
        self._seen.add(number)


def raise_at_once() -> None:
    """End a run in a process in which somebody may want to continue."""
    raise KeyboardInterrupt


def alone(seen: List[bool]) -> List[bool]:
    """Return what this process has seen: there are no others."""
    return seen


class SignalsBetweenSteps(Callback):
    """Keeps signals back until all processes of a run have come to the same place.

    In training this is the start of every batch: the update is then made, for a batch that was
    drawn must not be lost, and the run ends after it; on SIGTERM Lightning does that, or saves and
    continues if it was told to. In evaluation it is every batch too, unless there are several
    replicas: they may have different numbers of batches, and wait for the end.
    """

    def __init__(
        self,
        end_at_once: Callable[[], None] = raise_at_once,
        numbers: Sequence[int] = (signal.SIGINT,),
        agree: Callable[[List[bool]], List[bool]] = alone,
        tell: bool = True,
    ) -> None:
        """Hold nothing yet.

        Args:
            end_at_once: Is called by a second Ctrl-C.
            numbers: The signals.
            agree: Returns which signals any process has seen, given those of this one.
            tell: Whether this process says what a second Ctrl-C does.
        """
        self._signals = HeldSignals(end_at_once, tell)
        self._numbers = numbers
        self._agree = agree
        self._last_step = False  # Ctrl-C has come: the run ends after this step

    @override
    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._last_step = self._deliver()

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self._last_step:
            self._signals.interrupt()

    @override
    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._deliver_in_evaluation(trainer)

    @override
    def on_test_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._deliver_in_evaluation(trainer)

    @override
    def on_predict_batch_start(self, trainer: Trainer, *args: Any) -> None:
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
        """Say how to resume from what somebody's own ModelCheckpoint has just saved."""
        self.release()
        if isinstance(exception, KeyboardInterrupt):
            restore_signal_handlers(trainer)
        callbacks: List[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        keeper = trainer.checkpoint_callback
        if (
            ends_in_order(exception)
            and isinstance(keeper, ModelCheckpoint)
            and saves_on_exception(keeper)
            and keeper.last_model_path
            and not any(isinstance(callback, SaveOnTermination) for callback in callbacks)
        ):
            rank_zero_info(f"To resume: ckpt_path={keeper.last_model_path}")

    def release(self) -> None:
        """Leave the signals to whom they belong."""
        self._signals.release()

    def _deliver_in_evaluation(self, trainer: Trainer) -> None:
        sharing = trainer.distributed_sampler_kwargs
        if sharing is None or sharing["num_replicas"] == 1:
            self._deliver_now()

    def _end(self, trainer: Trainer) -> None:
        """Deliver where Lightning does not look any more, or a script would continue."""
        self._deliver_now()
        if signal.SIGTERM in self._numbers and trainer.received_sigterm:
            raise SIGTERMException

    def _deliver_now(self) -> None:
        if self._deliver():
            self._signals.interrupt()

    def _deliver(self) -> bool:
        """Let signals take effect that any process has seen, and return whether Ctrl-C is one."""
        self._signals.hold(self._numbers)
        votes = self._agree(self._signals.seen(self._numbers))
        seen = [number for number, vote in zip(self._numbers, votes) if vote]
        for number in seen:
            if number != signal.SIGINT:
                self._signals.deliver(number)
        return signal.SIGINT in seen
