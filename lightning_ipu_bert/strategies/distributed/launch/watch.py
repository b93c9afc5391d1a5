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
from typing import Callable, List, Optional, Tuple

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

running = threading.Event()
"""Set during a run on this rank."""


def watch_children(children: List[subprocess.Popen[bytes]]) -> None:
    """Exit this process and all children if one fails during a run. Child i is rank i + 1."""

    def failed() -> Optional[Tuple[int, int]]:
        if not running.is_set():
            return None
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


def watch_launcher() -> bool:
    """Exit this process if its launching rank is gone. Return whether it was launched by a rank."""
    launcher = int(os.environ.get(LAUNCHER_VARIABLE, 0))
    if launcher != os.getppid():
        return False
    rank = os.environ.get("LOCAL_RANK", "?")

    def gone() -> Optional[Tuple[int, int]]:
        if not running.is_set() or os.getppid() == launcher:
            return None
        time.sleep(GRACE_SECONDS / 5)  # it may have ended normally, shortly before this one
        return (0, 0) if running.is_set() else None

    def end(*_: int) -> None:
        if rank == "1":  # one line, not one per rank
            print_line(f"Rank 0 (process {launcher}) is gone. The job ends.")
        os._exit(1)

    _start(gone, end)
    return True


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
