"""Ranks watch each other: when one is gone, all end, and one line says which it was and why.

A rank that waits for another in a collective would notice late, and say only that a connection
was closed. Here the launching rank watches the others, and they watch it.
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
    TOLD,
    TOLD_USER_ERROR,
    tell,
)

LAUNCHER_VARIABLE = "LIGHTNING_IPU_BERT_LAUNCHER"
"""Environment variable with the process id of the rank that launched this one."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a rank that a second Ctrl-C has ended."""
CLEAN = (0, 128 + signal.SIGTERM)
"""Exit codes of ranks that ended in good order; Lightning ends all of them on SIGTERM."""
POLL_SECONDS = 0.2

running = threading.Event()
"""Set while this rank is in a run."""


def watch_children(children: List[subprocess.Popen[bytes]]) -> None:
    """End this process and all children once one fails in a run. Child i is rank i + 1."""

    def failed() -> Optional[Tuple[int, int]]:
        if not running.is_set():
            return None
        codes = ((rank, child.poll()) for rank, child in enumerate(children, 1))
        return next(((rank, code) for rank, code in codes if code not in (None, *CLEAN)), None)

    def end(rank: int, code: int) -> None:
        if code == TOLD_USER_ERROR:
            time.sleep(GRACE_SECONDS / 5)  # this rank may be about to say the same
        elif code not in (TOLD, INTERRUPTED):
            pid = children[rank - 1].pid
            tell(f"Rank {rank} (process {pid}) {_how(code)}. The job ends.")
        kill(children)
        os._exit({TOLD_USER_ERROR: 2, INTERRUPTED: INTERRUPTED}.get(code, 1))

    _start(failed, end)


def watch_launcher() -> bool:
    """End this process once the rank that launched it is gone. Return whether there is one."""
    launcher = int(os.environ.get(LAUNCHER_VARIABLE, 0))
    if launcher != os.getppid():
        return False
    rank = os.environ.get("LOCAL_RANK", "?")

    def gone() -> Optional[Tuple[int, int]]:
        if not running.is_set() or os.getppid() == launcher:
            return None
        time.sleep(GRACE_SECONDS / 5)  # it may have ended in good order, a little before this one
        return (0, 0) if running.is_set() else None

    def end(*_: int) -> None:
        if rank == "1":  # one line, not one of every rank
            tell(f"Rank 0 (process {launcher}) is gone. The job ends.")
        os._exit(1)

    _start(gone, end)
    return True


def kill(children: List[subprocess.Popen[bytes]]) -> None:
    """End all children at once, for they may hang in a collective, and watch them no longer."""
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
