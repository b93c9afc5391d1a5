"""Monitoring of ranks: if one is gone, all exit, and one line reports which rank and why.

A rank inside a collective notices late, and reports only that a connection was closed. Therefore
the launching rank monitors the others, and they monitor it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Set, Tuple

from lightning_ipu_bert.strategies.distributed.launch.failure import (
    GRACE_SECONDS,
    REPORTED,
    REPORTED_USER_ERROR,
    print_line,
    report_interrupt,
)

LAUNCHER_VARIABLE = "LIGHTNING_IPU_BERT_LAUNCHER"
"""Environment variable with the process id of the rank that launched this one."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a rank after a second Ctrl-C."""
CLEAN = (0, 128 + signal.SIGTERM)
"""Exit codes of ranks without a failure; Lightning ends all ranks on SIGTERM."""
POLL_SECONDS = 0.2
STOPPED_SECONDS = 5.0
"""How long a rank may be stopped before it is reported."""

running = threading.Event()
"""Set during a run on this rank."""


def watch_children(children: List[subprocess.Popen[bytes]], timeout_seconds: float) -> None:
    """Exit this process and all children if one fails during a run. Child i is rank i + 1.

    Args:
        children: The ranks that this one has started.
        timeout_seconds: Timeout of communication between ranks, for messages.
    """
    stopped = StoppedRanks(timeout_seconds)

    def failed() -> Optional[Tuple[int, int]]:
        if not running.is_set():
            return None
        stopped.look({rank: child.pid for rank, child in enumerate(children, 1)})
        codes = ((rank, child.poll()) for rank, child in enumerate(children, 1))
        return next(((rank, code) for rank, code in codes if code not in (None, *CLEAN)), None)

    def end(rank: int, code: int) -> None:
        if code == REPORTED_USER_ERROR:
            time.sleep(GRACE_SECONDS / 5)  # this rank may be about to report the same
        elif code == INTERRUPTED:
            report_interrupt()  # this rank may be in a collective, and has not handled it yet
        elif code != REPORTED:
            pid = children[rank - 1].pid
            print_line(f"Rank {rank} (process {pid}) {_how(code)}. The job ends.")
        kill(children)
        os._exit({REPORTED_USER_ERROR: 2, INTERRUPTED: INTERRUPTED}.get(code, 1))

    _start(failed, end)


def watch_launcher(timeout_seconds: float) -> bool:
    """Exit this process if its launching rank is gone. Return whether it was launched by a rank.

    Args:
        timeout_seconds: Timeout of communication between ranks, for messages.
    """
    launcher, rank = _launcher(), os.environ.get("LOCAL_RANK", "0")
    if not launcher or rank == "0" or (os.getppid() != launcher and is_alive(launcher)):
        return False
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # see `interrupts_ignored`
    stopped = StoppedRanks(timeout_seconds)

    def gone() -> Optional[Tuple[int, int]]:
        if not running.is_set():
            return None
        if os.getppid() == launcher:
            stopped.look({0: launcher} if rank == "1" else {})
            return None
        time.sleep(GRACE_SECONDS / 5)  # it may have ended normally, shortly before this one
        return (0, 0) if running.is_set() else None

    def end(*_: int) -> None:
        if rank == "1":  # one line, not one per rank
            print_line(f"Rank 0 (process {launcher}) is gone. The job ends.")
        os._exit(1)

    _start(gone, end)
    return True


def _launcher() -> int:
    """Return the process id of the rank that launched this one, or 0."""
    return int(os.environ.get(LAUNCHER_VARIABLE, 0))


def is_alive(pid: int) -> bool:
    """Return whether there is a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def state_of(pid: int) -> str:
    """Return the state of a process on Linux: T for stopped, empty if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf8")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[0]


class StoppedRanks:
    """Reports ranks that are stopped (SIGSTOP): the others wait for them without a word."""

    def __init__(self, timeout_seconds: float) -> None:
        """Create the object for the ranks that a rank can see."""
        self._timeout_seconds = timeout_seconds
        self._since: Dict[int, float] = {}
        self._reported: Set[int] = set()

    def look(self, processes: Mapping[int, int]) -> None:
        """Print a line for every rank that has been stopped for some seconds.

        Args:
            processes: Process ids by rank.
        """
        now, patience = time.monotonic(), min(STOPPED_SECONDS, self._timeout_seconds / 4)
        for rank, pid in processes.items():
            if state_of(pid) != "T":
                self._since.pop(rank, None)
                self._reported.discard(rank)
            elif now - self._since.setdefault(rank, now) > patience and rank not in self._reported:
                self._reported.add(rank)
                print_line(
                    f"Rank {rank} (process {pid}) is stopped. The other ranks wait for it, at most "
                    f"{self._timeout_seconds:g} s; continue it with: kill -CONT {pid}"
                )


def kill_stopped_launcher() -> None:
    """Kill the rank that launched this one if it is stopped, after this one has failed."""
    launcher = _launcher()
    if launcher and launcher == os.getppid() and state_of(launcher) == "T":
        os.kill(launcher, signal.SIGKILL)


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Let processes that are started within the context ignore Ctrl-C.

    A terminal sends it to all of them; while they import, they would print tracebacks. The rank
    that starts them ends them. Only the main thread can install handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def kill(children: List[subprocess.Popen[bytes]]) -> None:
    """Kill all children, which may be blocked in a collective, and stop monitoring them."""
    doomed = list(children)
    children.clear()
    for child in doomed:
        child.kill()
    for child in doomed:
        child.wait()


def _start(
    failed: Callable[[], Optional[Tuple[int, int]]], end: Callable[[int, int], None]
) -> None:
    def watch() -> None:
        while True:
            found = failed()
            if found is not None:
                end(*found)
            time.sleep(POLL_SECONDS)

    threading.Thread(target=watch, name="rank-watch", daemon=True).start()


def _how(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"
