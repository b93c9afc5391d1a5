"""What each rank does when: the order of a schedule, its timeline, its bubble and its stash.

Letters: P stages (or ranks, where each holds one stage), M micro-batches.
"""

from __future__ import annotations

from collections import deque
from typing import Deque, Dict, Iterator, List, NamedTuple, Sequence, Tuple

FORWARD, BACKWARD = "F", "B"
BACKWARD_INPUT, BACKWARD_WEIGHT = "I", "W"
"""The two halves of a backward that zero-bubble schedules tell apart."""


class Action(NamedTuple):
    """One forward or backward of one micro-batch in one stage."""

    stage: int
    kind: str
    """F, B, or I and W."""
    micro_batch: int


class Event(NamedTuple):
    """An action and when it runs."""

    rank: int
    action: Action
    start: float
    end: float


class Durations(NamedTuple):
    """How long the actions of a stage take, in any one unit."""

    forward: float = 1.0
    backward: float = 2.0
    """Of both halves together, which are taken to be equally long."""

    def of(self, kind: str) -> float:
        """Return the duration of an action."""
        return {FORWARD: self.forward, BACKWARD: self.backward}.get(kind, self.backward / 2)


def rank_order(
    schedule: str, position: int, ranks: int, stages_per_rank: int, micro_batches: int
) -> List[Action]:
    """Return what the rank at `position` of a replica does, in order.

    Args:
        schedule: A name of `lightning_ipu_bert.pipeline.config.SCHEDULES`.
        position: 0 holds the first stage.
        ranks: Ranks of a replica.
        stages_per_rank: Stages on each, looped: rank r holds r, r + ranks, r + 2 ranks, ...
        micro_batches: Micro-batches in a weight update.
    """
    if schedule == "gpipe":
        kinds = (FORWARD, BACKWARD)
        return [Action(position, kind, m) for kind in kinds for m in range(micro_batches)]
    if schedule == "1f1b":
        warmup = min(micro_batches, ranks - position)
        forwards = [Action(position, FORWARD, m) for m in range(micro_batches)]
        backwards = [Action(position, BACKWARD, m) for m in range(micro_batches)]
        return forwards[:warmup] + _alternate(backwards, forwards[warmup:])
    return _interleaved(schedule, position, ranks, stages_per_rank, micro_batches)


def _alternate(first: Sequence[Action], second: Sequence[Action]) -> List[Action]:
    """Take one of each in turn, then what is left of the longer `first`."""
    pairs = [action for pair in zip(first, second) for action in pair]
    return pairs + list(first[len(second) :])


def _interleaved(
    schedule: str, position: int, ranks: int, stages_per_rank: int, micro_batches: int
) -> List[Action]:
    """Order of the looped schedules: warm-up, one forward and one backward in turn, cool-down.

    Source: Narayanan et al. (arXiv:2104.04473), section 2.2.2, with rounds of any equal length;
    zero_bubble: Qi et al. (arXiv:2401.10241), section 3: fewer warm-up forwards, and weight halves
    put off by as many backwards as the rank's position.
    """
    zero_bubble = schedule == "zero_bubble"
    in_round = micro_batches // max(1, micro_batches // ranks)
    local_stages = range(position, ranks * stages_per_rank, ranks)
    forwards = list(_in_rounds(FORWARD, local_stages, in_round, micro_batches))
    kind = BACKWARD_INPUT if zero_bubble else BACKWARD
    backwards = list(_in_rounds(kind, local_stages[::-1], in_round, micro_batches))

    per_hop = 1 if zero_bubble else 2
    warmup = (stages_per_rank - 1) * in_round + per_hop * (ranks - 1 - position)
    warmup = min(warmup, len(forwards))
    order = forwards[:warmup]
    put_off: Deque[Action] = deque()
    for i, backward in enumerate(backwards):
        order += forwards[warmup + i : warmup + i + 1]
        order.append(backward)
        if zero_bubble:
            put_off.append(backward._replace(kind=BACKWARD_WEIGHT))
            if i >= position:
                order.append(put_off.popleft())
    return order + list(put_off)


def _in_rounds(
    kind: str, stages: Sequence[int], in_round: int, micro_batches: int
) -> Iterator[Action]:
    for first in range(0, micro_batches, in_round):
        for stage in stages:
            yield from (Action(stage, kind, m) for m in range(first, first + in_round))


def timeline(
    schedule: str,
    ranks: int,
    stages_per_rank: int,
    micro_batches: int,
    durations: Sequence[Durations] = (),
) -> List[Event]:
    """Return when every action runs if each starts as soon as its rank and its inputs allow.

    Args:
        schedule: See `rank_order`, as for the next three.
        ranks: Ranks of a replica.
        stages_per_rank: Stages on each.
        micro_batches: Micro-batches in a weight update.
        durations: Of each stage; all alike if empty. Transfers take no time.

    Raises:
        RuntimeError: If the order cannot run: ranks wait for each other.
    """
    stages = ranks * stages_per_rank
    durations = durations or [Durations()] * stages
    todo = [
        deque(rank_order(schedule, r, ranks, stages_per_rank, micro_batches)) for r in range(ranks)
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
            raise RuntimeError(f"{schedule} stands still before {[a[0] for a in todo if a]}.")
    return sorted(events, key=lambda event: (event.start, event.rank))


def _done(action: Action) -> Tuple[int, str, int]:
    """Return what an action provides: a full backward gives its input half to the stage before."""
    kind = BACKWARD_INPUT if action.kind == BACKWARD else action.kind
    return action.stage, kind, action.micro_batch


def _needs(action: Action, stages: int) -> List[Tuple[int, str, int]]:
    """Return what must be done before an action."""
    stage, kind, m = action
    if kind == FORWARD:
        return [(stage - 1, FORWARD, m)] if stage else []
    if kind == BACKWARD_WEIGHT:
        return [(stage, BACKWARD_INPUT, m)]
    after = [(stage + 1, BACKWARD_INPUT, m)] if stage + 1 < stages else []
    return [(stage, FORWARD, m), *after]


def idle_shares(events: Sequence[Event]) -> List[float]:
    """Return the share of the whole time in which each rank waits."""
    total = max(event.end for event in events)
    busy: Dict[int, float] = {}
    for event in events:
        busy[event.rank] = busy.get(event.rank, 0.0) + event.end - event.start
    return [1 - busy[rank] / total for rank in sorted(busy)]


def bubble_fraction(schedule: str, ranks: int, stages_per_rank: int, micro_batches: int) -> float:
    """Return the mean share of time in which a rank waits, for stages of equal length.

    Source:
        (P - 1) / (M + P - 1) for gpipe and 1f1b: Huang et al. (arXiv:1811.06965), section 2.3. Of
        the other schedules the timeline tells.
    """
    if schedule in ("gpipe", "1f1b"):
        return (ranks - 1) / (micro_batches + ranks - 1)
    shares = idle_shares(timeline(schedule, ranks, stages_per_rank, micro_batches))
    return sum(shares) / len(shares)


def stash_depths(schedule: str, ranks: int, stages_per_rank: int, micro_batches: int) -> List[int]:
    """Return for every stage how many micro-batches' activations it holds at most.

    M for gpipe; for 1f1b min(M, P - stage). Of the other schedules the order tells: a stage holds a
    micro-batch from its forward to the end of its backward.
    """
    if schedule == "gpipe":
        return [micro_batches] * ranks
    if schedule == "1f1b":
        return [min(micro_batches, ranks - stage) for stage in range(ranks)]
    deepest = [0] * (ranks * stages_per_rank)
    held = [0] * len(deepest)
    for position in range(ranks):
        for action in rank_order(schedule, position, ranks, stages_per_rank, micro_batches):
            held[action.stage] += {FORWARD: 1, BACKWARD_INPUT: 0}.get(action.kind, -1)
            deepest[action.stage] = max(deepest[action.stage], held[action.stage])
    return deepest
