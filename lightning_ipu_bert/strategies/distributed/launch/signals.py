"""Handling of SIGTERM and Ctrl-C between two steps, on all ranks.

Lightning's handlers communicate immediately: they broadcast, or gather a checkpoint. A signal may
arrive at any time: a rank that waits for a hidden state would not reach the collective, and
the rank that should send it would block in the handler.
"""

from __future__ import annotations

import signal
from typing import Callable, List, Optional

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments import SLURMEnvironment

from lightning_ipu_bert.training.interrupts import SignalsBetweenSteps


def signals_of_ranks(
    environment: Optional[ClusterEnvironment],
    device: torch.device,
    end_at_once: Callable[[], None],
    is_common_step: Callable[[], bool],
) -> SignalsBetweenSteps:
    """Return the callback that a pipeline strategy adds for the duration of a run.

    Args:
        environment: The cluster environment; SLURM defines the signal before the end of a job.
        device: Device of the collectives.
        end_at_once: Called by a second Ctrl-C.
        is_common_step: Whether all ranks run the current step of an evaluation.
    """

    def agree(seen: List[bool]) -> List[bool]:
        votes = torch.tensor(seen, dtype=torch.int32, device=device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    numbers = [signal.SIGINT, *_signals_of_lightning(environment)]
    print_hint = dist.get_rank() == 0
    return SignalsBetweenSteps(end_at_once, numbers, agree, print_hint, is_common_step)


def _signals_of_lightning(environment: Optional[ClusterEnvironment]) -> List[int]:
    """Return the signals that Lightning handles."""
    numbers: List[int] = [signal.SIGTERM]
    slurm = environment if isinstance(environment, SLURMEnvironment) else None
    if slurm is not None and slurm.auto_requeue and slurm.requeue_signal is not None:
        numbers.append(slurm.requeue_signal)
    return numbers
