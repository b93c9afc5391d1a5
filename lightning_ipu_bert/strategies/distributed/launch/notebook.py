"""Launcher of ranks from a notebook, which forwards Ctrl-C to them and waits."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, Iterator, NoReturn, Optional

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch.multiprocessing.spawn import ProcessExitedException
from typing_extensions import override

from lightning_ipu_bert._compat.lightning import MultiProcessingLauncher, handle_interrupt
from lightning_ipu_bert.strategies.distributed.launch import watch
from lightning_ipu_bert.strategies.distributed.launch.launcher import Prepare
from lightning_ipu_bert.training.termination import InterruptedBetweenSteps


class NotebookLauncher(MultiProcessingLauncher):
    """Forks (or spawns) the ranks from a notebook, where there is no script to run again."""

    def __init__(self, strategy: ParallelStrategy, start_method: Any, prepare: Prepare) -> None:
        """Create a launcher.

        Args:
            strategy: The strategy, required by the launcher of Lightning.
            start_method: fork or spawn.
            prepare: Called before any process is started.
        """
        super().__init__(strategy, start_method=start_method)
        self._prepare = prepare

    @override
    def launch(
        self,
        function: Callable[..., object],
        *args: object,
        trainer: Optional[Trainer] = None,
        **kwargs: object,
    ) -> object:
        """Check the run, start the ranks and call the function in them.

        Raises:
            RuntimeError: If a second Ctrl-C has ended the ranks. After KeyboardInterrupt, Lightning
                would exit the notebook and ignore further Ctrl-C.
        """
        self._prepare(trainer, args)
        forwards = _handles_interrupts()
        entry = Interruptible(function, trainer, own_group=forwards)
        try:
            with self._forwarded_interrupts() if forwards else nullcontext():
                return super().launch(entry, *args, trainer=trainer, **kwargs)
        except ProcessExitedException as error:
            if error.exit_code != watch.INTERRUPTED:
                raise
            raise RuntimeError("Ended immediately by Ctrl-C; nothing was saved.") from None

    @contextmanager
    def _forwarded_interrupts(self) -> Iterator[None]:
        """Forward Ctrl-C to the ranks within the context."""
        here, previous = os.getpid(), signal.getsignal(signal.SIGINT)

        def forward(number: int, _: object) -> None:
            for process in self.procs if os.getpid() == here else ():
                if process.pid is not None and process.is_alive():
                    os.kill(process.pid, number)

        signal.signal(signal.SIGINT, forward)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def end_at_once(self) -> NoReturn:
        """Exit this rank after a second Ctrl-C."""
        os._exit(watch.INTERRUPTED)


def _handles_interrupts() -> bool:
    """Return whether Ctrl-C is handled here, and not by a handler of the user."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Interruptible:
    """Entry point of a run in a forked rank, in which Lightning does not handle Ctrl-C.

    After Ctrl-C between two steps it returns normally, so that the weights are returned to the
    notebook.
    """

    def __init__(
        self, function: Callable[..., object], trainer: Optional[Trainer], own_group: bool
    ) -> None:
        """Wrap an entry point.

        Args:
            function: The entry point.
            trainer: The Trainer.
            own_group: Whether the rank gets Ctrl-C from the notebook only, and not a second time
                from a terminal or kernel that sends it to the process group.
        """
        self._function = function
        self._trainer = trainer
        self._own_group = own_group

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the entry point."""
        if self._own_group:
            os.setpgrp()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # not that of the notebook
        try:
            return self._function(*args, **kwargs)
        except InterruptedBetweenSteps as exception:
            if self._trainer is None:
                raise
            handle_interrupt(self._trainer, exception)
            return None
        except KeyboardInterrupt:  # before the first step; the notebook waits for an exit code
            os._exit(watch.INTERRUPTED)
