"""Signals whose handlers are called later, at a point where a run can be ended."""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Any, Callable, Dict, List, Sequence, Set

from lightning_ipu_bert.training.termination import InterruptedBetweenSteps

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
