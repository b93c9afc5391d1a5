"""Timelines of schedules: when each action runs, idle time and stashed activations of a rank.

Notation: P stages (or ranks, where each holds one stage), M micro-batches.
"""

from __future__ import annotations

from collections import deque
from typing import Dict, List, NamedTuple, Sequence, Tuple

from lightning_ipu_bert.pipeline.schedules import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    SCHEDULES,
    Action,
    RankSlot,
)


class Event(NamedTuple):
    """An action with its start and end."""

    rank: int
    action: Action
    start: float
    end: float


class Durations(NamedTuple):
    """Durations of the actions of a stage, in any unit."""

    forward: float = 1.0
    backward: float = 2.0
    """Input and weight gradients together, which are assumed to take equally long."""

    def of(self, kind: str) -> float:
        """Return the duration of an action."""
        return {FORWARD: self.forward, BACKWARD: self.backward}.get(kind, self.backward / 2)


def timeline(
    schedule: str,
    ranks: int,
    stages_per_rank: int,
    micro_batches: int,
    durations: Sequence[Durations] = (),
) -> List[Event]:
    """Return all actions with their times, each started as soon as its rank and inputs are ready.

    Args:
        schedule: A name of `SCHEDULES`.
        ranks: Ranks of a replica.
        stages_per_rank: Stages per rank, looped.
        micro_batches: Micro-batches in a weight update.
        durations: One per stage; equal for all stages if empty. Transfers take no time.

    Raises:
        RuntimeError: If the order deadlocks.
    """
    stages = ranks * stages_per_rank
    durations = durations or [Durations()] * stages
    todo = [
        deque(SCHEDULES[schedule].order(RankSlot(r, ranks, stages_per_rank, micro_batches)))
        for r in range(ranks)
    ]
    ends: Dict[Tuple[int, str, int], float] = {}
    free = [0.0] * ranks
    events: List[Event] = []
    while any(todo):
        before = len(events)
        for rank, actions in enumerate(todo):
            while actions and all(key in ends for key in _needs(actions[0], stages)):
                action = actions.popleft()
                start = max([free[rank], *(ends[key] for key in _needs(action, stages))])
                free[rank] = start + durations[action.stage].of(action.kind)
                ends[_done(action)] = free[rank]
                events.append(Event(rank, action, start, free[rank]))
        if len(events) == before:
            raise RuntimeError(f"{schedule} deadlocks before {[a[0] for a in todo if a]}.")
    return sorted(events, key=lambda event: (event.start, event.rank))


def _done(action: Action) -> Tuple[int, str, int]:
    """Return what an action provides: a full backward provides the input gradient."""
    kind = BACKWARD_INPUT if action.kind == BACKWARD else action.kind
    return action.stage, kind, action.micro_batch


def _needs(action: Action, stages: int) -> List[Tuple[int, str, int]]:
    """Return the dependencies of an action."""
    stage, kind, m = action
    if kind == FORWARD:
        return [(stage - 1, FORWARD, m)] if stage else []
    if kind == BACKWARD_WEIGHT:
        return [(stage, BACKWARD_INPUT, m)]
    after = [(stage + 1, BACKWARD_INPUT, m)] if stage + 1 < stages else []
    return [(stage, FORWARD, m), *after]


def idle_fractions(events: Sequence[Event]) -> List[float]:
    """Return the fraction of the total time that each rank is idle."""
    total = max(event.end for event in events)
    busy: Dict[int, float] = {}
    for event in events:
        busy[event.rank] = busy.get(event.rank, 0.0) + event.end - event.start
    return [1 - busy[rank] / total for rank in sorted(busy)]


def bubble_fraction(schedule: str, ranks: int, stages_per_rank: int, micro_batches: int) -> float:
    """Return the mean fraction of time that a rank is idle, for stages of equal time.

    Uses the closed form of the schedule if it has one, otherwise the timeline.
    """
    closed_form = SCHEDULES[schedule].bubble_fraction
    if closed_form is not None and stages_per_rank == 1:
        return closed_form(ranks, micro_batches)
    fractions = idle_fractions(timeline(schedule, ranks, stages_per_rank, micro_batches))
    return sum(fractions) / len(fractions)


def stash_depths(schedule: str, ranks: int, stages_per_rank: int, micro_batches: int) -> List[int]:
    """Return for every stage the maximum number of micro-batches whose activations it stashes.

    Uses the closed form of the schedule if it has one, otherwise the order: a stage stashes a
    micro-batch from its forward to the end of its backward.
    """
    closed_form = SCHEDULES[schedule].stash_depth
    if closed_form is not None and stages_per_rank == 1:
        return [closed_form(stage, ranks, micro_batches) for stage in range(ranks)]
    deepest = [0] * (ranks * stages_per_rank)
    held = [0] * len(deepest)
    for rank in range(ranks):
        for action in SCHEDULES[schedule].order(
            RankSlot(rank, ranks, stages_per_rank, micro_batches)
        ):
            held[action.stage] += {FORWARD: 1, BACKWARD_INPUT: 0}.get(action.kind, -1)
            deepest[action.stage] = max(deepest[action.stage], held[action.stage])
    return deepest
