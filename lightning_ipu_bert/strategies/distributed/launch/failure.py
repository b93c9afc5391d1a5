"""A rank that fails: whether all have failed alike, and if not, who says so."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import NoReturn

import torch.distributed as dist

from lightning_ipu_bert._compat.torch import wait_for_keys
from lightning_ipu_bert.errors import UserError

TOLD, TOLD_USER_ERROR = 71, 72
"""Exit codes of a rank that has said itself why it ends."""
GRACE_SECONDS = 10.0
"""How long a rank that lost a connection waits to be told whose it was."""
AGREEMENT_SECONDS = 3.0
"""How long a rank that failed waits for the others to fail alike."""


def all_failed_alike(exception: BaseException, launch: int) -> bool:
    """Return whether every rank has raised the same, so that all are at the same place.

    Then no rank is in the middle of a collective, the weights can be gathered, and whoever catches
    the exception can run again. Nothing is said in the process group, which may hang.

    Args:
        exception: What this rank has raised.
        launch: Which launch of this process it is.
    """
    anywhere = isinstance(exception, KeyboardInterrupt) or lost_connection(exception)
    if anywhere or not dist.is_initialized():
        return False
    rank, world = dist.get_rank(), dist.get_world_size()
    keys = [f"lightning_ipu_bert/failed/{launch}/{r}" for r in range(world)]
    text = f"{type(exception).__name__}: {exception}"
    try:
        said = wait_for_keys(keys, keys[rank], text, AGREEMENT_SECONDS)
    except RuntimeError:  # also of a store that is gone with its rank
        return False
    return len(set(said)) == 1


def lost_connection(exception: BaseException) -> bool:
    """Return whether an exception only says that another rank is gone."""
    text = str(exception)
    return isinstance(exception, RuntimeError) and any(
        word in text
        for word in ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    )


def report(rank: int, where: str, exception: BaseException) -> None:
    """Say in one line what happened on which rank; but wait, if it happened on another."""
    if lost_connection(exception):
        time.sleep(GRACE_SECONDS)
    while exception.__cause__ is not None:  # torch's schedules wrap what a stage raises
        exception = exception.__cause__
    what = (str(exception).strip().splitlines() or [""])[0]
    tell(f"Rank {rank} failed {where}: {type(exception).__name__}: {what}".rstrip(": "))


def leave(exception: BaseException) -> NoReturn:
    """End a rank whose launcher must know that it has said why."""
    if isinstance(exception, UserError):
        print(f"error: {exception}", file=sys.stderr, flush=True)
        os._exit(TOLD_USER_ERROR)
    traceback.print_exception(type(exception), exception, exception.__traceback__)
    os._exit(TOLD)


def tell(line: str) -> None:
    """Print a line about ranks."""
    print(line, file=sys.stderr, flush=True)
