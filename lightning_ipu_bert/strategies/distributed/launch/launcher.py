"""Launcher of ranks as scripts, after all checks of the run."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from typing import Any, Callable, Iterator, NoReturn, Optional, TextIO

from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_ipu_bert._compat.lightning import (
    SubprocessScriptLauncher,
    set_num_threads,
    start_scripts,
)
from lightning_ipu_bert.strategies.distributed.launch import failure, watch
from lightning_ipu_bert.training.termination import InterruptedBetweenSteps

Prepare = Callable[[Optional[Trainer], object], None]
"""Checks a run; called with the Trainer and the arguments of its entry point."""


class ScriptLauncher(SubprocessScriptLauncher):
    """Runs the script again for every other rank on this machine.

    Under torchrun, SLURM and so on the processes already exist, and it only checks the run.
    """

    def __init__(
        self,
        environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int,
        prepare: Prepare,
        fail: Callable[[BaseException], None],
        timeout_seconds: float,
    ) -> None:
        """Create a launcher.

        Args:
            environment: The cluster environment.
            num_processes: Ranks on this machine.
            num_nodes: Number of machines.
            prepare: Called before any process is started.
            fail: Called with an exception of this rank that other ranks did not raise.
            timeout_seconds: Timeout of communication between ranks.
        """
        super().__init__(environment, num_processes, num_nodes)
        self._prepare = prepare
        self._fail = fail
        self._timeout_seconds = timeout_seconds
        self._launches = 0
        self._was_launched = False
        self._stderr: TextIO = sys.stderr

    @override
    def launch(
        self,
        function: Callable[..., object],
        *args: object,
        trainer: Optional[Trainer] = None,
        **kwargs: object,
    ) -> object:
        """Check the run, start the ranks and call the function."""
        self._prepare(trainer, args)
        self._launches += 1
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        set_num_threads(self.num_processes)
        with self._watched():
            if not environment.creates_processes_externally:
                self._start()
            elif self._launches == 1:
                self._was_launched = watch.watch_launcher(self._timeout_seconds)
            return function(*args, **kwargs)

    def _start(self) -> None:
        """Start the other ranks on this machine, and monitor them."""
        os.environ[watch.LAUNCHER_VARIABLE] = str(os.getpid())
        with watch.interrupts_ignored():  # by the ranks, until they can end in order
            start_scripts(self)
        watch.watch_children(self.procs, self._timeout_seconds)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Monitor the ranks within the context; if one fails, all exit."""
        sys.stderr = self._stderr
        watch.running.set()
        try:
            yield
        except (InterruptedBetweenSteps, SIGTERMException):
            raise  # all ranks end in the same step
        except BaseException as exception:
            if failure.all_failed_equally(exception, self._launches):
                self._mute_unless_first_rank()
                raise
            self._fail(exception)
            watch.kill(self.procs)
            watch.kill_stopped_launcher()
            if self._was_launched and not isinstance(exception, KeyboardInterrupt):
                failure.leave(exception)
            raise
        finally:
            watch.running.clear()

    def _mute_unless_first_rank(self) -> None:
        if self._was_launched:
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    @override
    def kill(self, signum: Any) -> None:
        """Send a signal to the ranks started by this one."""
        if signum == signal.SIGKILL:
            watch.kill(self.procs)
        super().kill(signum)

    def end_at_once(self) -> NoReturn:
        """Exit this rank and those started by it, after a second Ctrl-C."""
        if not self._was_launched:
            failure.report_interrupt()
        watch.kill(self.procs)
        os._exit(watch.INTERRUPTED)
