"""Ranks as forked processes: quick to start, and not pytest run anew as by Lightning's launcher."""

import os
import pickle
import socket
import traceback

import torch
import torch.multiprocessing as mp


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(function, args, rank, world, port, results):
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
        results.put((rank, True, pickle.dumps(function(*args))))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        os._exit(1)


def run_ranks(world, function, *args, timeout=120):
    """Call a function in `world` processes; return what it returned in each, by rank."""
    context = mp.get_context("fork")
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(function, args, rank, world, port, results))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        answers = [results.get(timeout=timeout) for _ in processes]
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
    failed = [answer for answer in answers if not answer[1]]
    assert not failed, f"rank {failed[0][0]} of {world} failed:\n{failed[0][2]}"
    return [pickle.loads(value) for _, _, value in sorted(answers)]
