"""What a rank waits for while a job starts."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from datetime import timedelta
from typing import Iterator

from lightning.fabric.plugins import ClusterEnvironment

from lightning_ipu_bert.strategies.distributed.launch.failure import print_line

PATIENCE_SECONDS = 15.0
"""How long the ranks of a job usually need to start."""


@contextmanager
def waiting_announced(environment: ClusterEnvironment, timeout: timedelta) -> Iterator[None]:
    """Print what the first rank of a machine waits for, if the context takes long.

    Args:
        environment: The cluster environment.
        timeout: How long it waits at most.
    """
    timer = threading.Timer(
        min(PATIENCE_SECONDS, timeout.total_seconds() / 2),
        lambda: print_line(what_is_missing(environment, timeout)),
    )
    timer.daemon = True
    if environment.local_rank() == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def what_is_missing(environment: ClusterEnvironment, timeout: timedelta) -> str:
    """Return a line about the ranks that have not arrived."""
    address, port = environment.main_address, environment.main_port
    world, rank = environment.world_size(), environment.global_rank()
    where = f"MASTER_ADDR={address} MASTER_PORT={port}"
    if not _is_known(address):
        where += ", whose address is unknown on this machine"
    return (
        f"Rank {rank} waits for the other ranks of {world} at {where}, at most "
        f"{timeout.total_seconds():g} s. Start the script on all nodes, with the same MASTER_ADDR "
        "and MASTER_PORT, and NODE_RANK from 0 on."
    )


def _is_known(address: str) -> bool:
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        return False
    return True
