"""Failures of ranks: whether all ranks raised the same error, and how others are reported."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from typing import NoReturn

import torch.distributed as dist

from lightning_ipu_bert._compat.torch import lost_connection, wait_for_keys
from lightning_ipu_bert.errors import UserError

REPORTED, REPORTED_USER_ERROR = 71, 72
"""Exit codes of a rank that has printed its error itself."""
GRACE_SECONDS = 10.0
"""How long a rank that lost a connection waits for the failed rank to report."""
AGREEMENT_SECONDS = 3.0
"""How long a failed rank waits for the other ranks to fail with the same error."""

_interrupt_is_unreported = threading.Lock()
"""Taken by the first of the signal handler and the monitoring thread that reports."""


def all_failed_equally(exception: BaseException, launch: int) -> bool:
    """Return whether all ranks raised the same exception.

    Then no rank is inside a collective, the weights can be gathered, and the exception can be
    caught and followed by another run. Uses no collective, which could hang.

    Args:
        exception: The exception of this rank.
        launch: Number of launches in this process so far.
    """
    local = isinstance(exception, KeyboardInterrupt) or lost_connection(exception)
    if local or not dist.is_initialized():
        return False
    rank, world = dist.get_rank(), dist.get_world_size()
    keys = [f"lightning_ipu_bert/failed/{launch}/{r}" for r in range(world)]
    text = f"{type(exception).__name__}: {exception}"
    try:
        texts = wait_for_keys(keys, keys[rank], text, AGREEMENT_SECONDS)
    except RuntimeError:  # also raised by a store whose rank is gone
        return False
    return len(set(texts)) == 1


def report(rank: int, where: str, exception: BaseException) -> None:
    """Print the failure of this rank in one line, after a delay if another rank failed first."""
    if lost_connection(exception):
        time.sleep(GRACE_SECONDS)
    while exception.__cause__ is not None:  # schedules of torch wrap exceptions of stages
        exception = exception.__cause__
    what = (str(exception).strip().splitlines() or [""])[0]
    print_line(f"Rank {rank} failed {where}: {type(exception).__name__}: {what}".rstrip(": "))


def leave(exception: BaseException) -> NoReturn:
    """Exit with a code that tells the launcher that the error is printed."""
    if isinstance(exception, UserError):
        print(f"error: {exception}", file=sys.stderr, flush=True)
        os._exit(REPORTED_USER_ERROR)
    traceback.print_exception(type(exception), exception, exception.__traceback__)
    os._exit(REPORTED)


def report_interrupt() -> None:
    """Print once per process that a second Ctrl-C ends the job."""
    if _interrupt_is_unreported.acquire(blocking=False):
        print_line("Ended immediately by Ctrl-C; nothing was saved.")


def print_line(line: str) -> None:
    """Print a line to standard error."""
    print(line, file=sys.stderr, flush=True)
