"""Ranks as forked processes, for benchmarks and tests.

Faster than Lightning's launcher, which runs the current script again.
"""

from __future__ import annotations

import os
import pickle
import random
import socket
import traceback
from typing import Any, Callable, List, NamedTuple

import torch
import torch.multiprocessing as mp


class Ranks(NamedTuple):
    """Processes that were started, and where their answers come in."""

    processes: List[Any]
    answers: Any


def free_port() -> int:
    """Return a free port below those that the kernel gives to connections of other processes."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _rank(
    function: Callable[..., Any], args: Any, rank: int, world: int, port: int, answers: Any
) -> None:
    # Lightning takes a process with LOCAL_RANK for one that was started for it.
    os.environ.update(
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        # Pickled here: torch would share the tensors' memory, which ends with this process.
        answers.put((rank, True, pickle.dumps(function(*args))))
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))
        answers.close()
        answers.join_thread()  # or the answer would be lost with this process
        os._exit(1)


def start_ranks(world: int, function: Callable[..., Any], *args: Any) -> Ranks:
    """Call a function in `world` processes, which find each other as ranks of one job."""
    context: Any = mp.get_context("fork")
    answers, port = context.Queue(), free_port()
    processes = [
        context.Process(target=_rank, args=(function, args, rank, world, port, answers))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return Ranks(processes, answers)


def collect(ranks: Ranks, timeout: float) -> List[Any]:
    """Return what the function returned in each process, by rank; wait `timeout` seconds."""
    try:
        answers = [ranks.answers.get(timeout=timeout) for _ in ranks.processes]
    finally:
        for process in ranks.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
    failed = [answer for answer in answers if not answer[1]]
    if failed:
        raise AssertionError(f"rank {failed[0][0]} of {len(answers)} failed:\n{failed[0][2]}")
    return [pickle.loads(value) for _, _, value in sorted(answers)]


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 120
) -> List[Any]:
    """Call a function in `world` processes; return what it returned in each, by rank."""
    return collect(start_ranks(world, function, *args), timeout)
