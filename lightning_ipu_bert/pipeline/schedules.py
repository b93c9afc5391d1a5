"""Schedules: the order of forwards and backwards on a rank, in one table.

Notation: P ranks of a replica, M micro-batches. A new schedule is an entry of `SCHEDULES` and a
function that returns its order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Callable, Deque, Dict, Iterator, List, NamedTuple, Optional, Sequence, Union

from lightning_ipu_bert.pipeline.rules import Violation, choice_rule

FORWARD, BACKWARD = "F", "B"
BACKWARD_INPUT, BACKWARD_WEIGHT = "I", "W"
"""Gradients of the input and of the weights, which zero-bubble schedules compute separately."""


class Action(NamedTuple):
    """A forward or backward of one micro-batch in one stage."""

    stage: int
    kind: str
    """F, B, or I and W."""
    micro_batch: int


class RankSlot(NamedTuple):
    """A rank of a replica, and its workload per weight update."""

    rank: int
    """Pipeline rank; 0 holds the first stage."""
    ranks: int
    """Ranks of a replica."""
    stages_per_rank: int
    """Stages on each rank, looped: rank r holds r, r + ranks, r + 2 ranks, ..."""
    micro_batches: int
    """Micro-batches per weight update."""


@dataclass(frozen=True)
class Schedule:
    """Properties of a schedule."""

    order: Callable[[RankSlot], List[Action]]
    """Returns the actions of a rank, in order."""
    torch_class: str
    """Class in `torch.distributed.pipelining.schedules`."""
    torch_class_for_any_count: str
    """Class for numbers of micro-batches that violate the rules of this schedule: ragged last
    batches and evaluation."""
    takes_stage_list: bool = False
    """Whether the class takes a list of stages instead of a single one."""
    min_stages_per_rank: int = 1
    max_stages_per_rank: Union[int, float] = 1
    on_ipus: bool = False
    """Whether PopTorch runs it."""
    splits_backward: bool = False
    """Whether gradients of inputs and of weights are computed at different times."""
    in_rounds: bool = False
    """Whether micro-batches run in equal rounds of about one per rank."""
    fills_stages: bool = False
    """Whether it needs at least one micro-batch per stage."""
    bubble_fraction: Optional[Callable[[int, int], float]] = None
    """Closed form in P and M for stages of equal time; None computes it from the timeline."""
    stash_depth: Optional[Callable[[int, int, int], int]] = None
    """Closed form in stage, P and M: maximum number of micro-batches whose activations a stage
    stashes; None computes it from the order."""


def gpipe_order(slot: RankSlot) -> List[Action]:
    """All forwards, then all backwards."""
    kinds = (FORWARD, BACKWARD)
    return [Action(slot.rank, kind, m) for kind in kinds for m in range(slot.micro_batches)]


def one_forward_one_backward_order(slot: RankSlot) -> List[Action]:
    """Forwards until the pipeline is full, then alternating backwards and forwards."""
    warmup = min(slot.micro_batches, slot.ranks - slot.rank)
    forwards = [Action(slot.rank, FORWARD, m) for m in range(slot.micro_batches)]
    backwards = [Action(slot.rank, BACKWARD, m) for m in range(slot.micro_batches)]
    pairs = [action for pair in zip(backwards, forwards[warmup:]) for action in pair]
    return forwards[:warmup] + pairs + backwards[len(forwards) - warmup :]


def interleaved_order(slot: RankSlot, zero_bubble: bool = False) -> List[Action]:
    """Warm-up, alternating forwards and backwards, cool-down; over several stages of a rank.

    Rounds may have any equal length. With `zero_bubble` there are fewer warm-up forwards, and
    rank r delays the weight gradients of a backward by r backwards.
    """
    in_round = slot.micro_batches // rounds_of(slot.ranks, slot.micro_batches)
    stages = range(slot.rank, slot.ranks * slot.stages_per_rank, slot.ranks)
    forwards = list(_in_rounds(FORWARD, stages, in_round, slot.micro_batches))
    kind = BACKWARD_INPUT if zero_bubble else BACKWARD
    backwards = list(_in_rounds(kind, stages[::-1], in_round, slot.micro_batches))

    per_hop = 1 if zero_bubble else 2
    warmup = (slot.stages_per_rank - 1) * in_round + per_hop * (slot.ranks - 1 - slot.rank)
    warmup = min(warmup, len(forwards))
    order = forwards[:warmup]
    delayed: Deque[Action] = deque()
    for i, backward in enumerate(backwards):
        order += forwards[warmup + i : warmup + i + 1]
        order.append(backward)
        if zero_bubble:
            delayed.append(backward._replace(kind=BACKWARD_WEIGHT))
            if i >= slot.rank:
                order.append(delayed.popleft())
    return order + list(delayed)


def _in_rounds(
    kind: str, stages: Sequence[int], in_round: int, micro_batches: int
) -> Iterator[Action]:
    for first in range(0, micro_batches, in_round):
        for stage in stages:
            yield from (Action(stage, kind, m) for m in range(first, first + in_round))


def rounds_of(ranks: int, micro_batches: int) -> int:
    """Return the number of rounds of a looped schedule."""
    return max(1, micro_batches // ranks)


def _bubble(ranks: int, micro_batches: int) -> float:
    """(P - 1) / (M + P - 1). Source: Huang et al., GPipe (arXiv:1811.06965), section 2.3."""
    return (ranks - 1) / (micro_batches + ranks - 1)


SCHEDULES: Dict[str, Schedule] = {
    "gpipe": Schedule(
        gpipe_order,
        "ScheduleGPipe",
        "ScheduleGPipe",
        bubble_fraction=_bubble,
        stash_depth=lambda stage, ranks, micro_batches: micro_batches,
    ),
    "1f1b": Schedule(
        one_forward_one_backward_order,
        "Schedule1F1B",
        "ScheduleGPipe",
        on_ipus=True,
        fills_stages=True,
        bubble_fraction=_bubble,
        stash_depth=lambda stage, ranks, micro_batches: min(micro_batches, ranks - stage),
    ),
    "interleaved_1f1b": Schedule(
        interleaved_order,
        "ScheduleInterleaved1F1B",
        "ScheduleLoopedBFS",
        takes_stage_list=True,
        min_stages_per_rank=2,
        max_stages_per_rank=float("inf"),
        in_rounds=True,
    ),
    "zero_bubble": Schedule(
        partial(interleaved_order, zero_bubble=True),
        "ScheduleInterleavedZeroBubble",
        "ScheduleLoopedBFS",
        takes_stage_list=True,
        max_stages_per_rank=float("inf"),
        in_rounds=True,
        splits_backward=True,
    ),
}
"""Schedules by name.

Sources:
    gpipe: Huang et al., GPipe (arXiv:1811.06965), section 2.3. 1f1b, interleaved_1f1b: Narayanan et
    al., Efficient Large-Scale Language Model Training (arXiv:2104.04473), sections 2.2.1 and 2.2.2.
    zero_bubble: Qi et al., Zero Bubble Pipeline Parallelism (arXiv:2401.10241), schedule ZB-H1.
"""


def schedule_rules(name: str, stages_per_rank: int) -> Iterator[Violation]:
    """The schedule must be known and support the number of stages per rank."""
    yield from choice_rule("schedule", name, SCHEDULES)
    if name not in SCHEDULES:
        return
    schedule = SCHEDULES[name]
    if stages_per_rank < schedule.min_stages_per_rank:
        yield Violation(
            "schedule",
            name,
            f"needs several stages per rank, but stages_per_rank={stages_per_rank}",
            f"Set stages_per_rank to {schedule.min_stages_per_rank} or more, or use "
            "schedule='1f1b'.",
        )
    if stages_per_rank > schedule.max_stages_per_rank:
        yield Violation(
            "schedule",
            name,
            f"supports one stage per rank, but stages_per_rank={stages_per_rank}",
            "Set stages_per_rank to 1, or use schedule='interleaved_1f1b'.",
        )


def micro_batch_rules(
    name: str, num_stages: int, ranks: int, micro_batches: int
) -> Iterator[Violation]:
    """The schedule must have enough micro-batches."""
    schedule, field = SCHEDULES[name], "gradient_accumulation_steps"
    if schedule.fills_stages and micro_batches < num_stages:
        yield Violation(
            field,
            micro_batches,
            f"is too few for schedule='{name}' with {num_stages} stages, which needs a micro-batch "
            "per stage",
            f"Set it to {num_stages} or more, or use schedule='gpipe'.",
        )
    rounds = rounds_of(ranks, micro_batches)
    if schedule.in_rounds and micro_batches % rounds:
        yield Violation(
            field,
            micro_batches,
            f"must be divisible by {rounds}, the number of rounds of schedule='{name}' on {ranks} "
            "ranks",
            f"Set it to a multiple of {ranks}, e.g. {(micro_batches // ranks + 1) * ranks}.",
        )


def torch_class_of(name: str, num_stages: int, ranks: int, micro_batches: int) -> str:
    """Return the name of the torch class that runs this number of micro-batches."""
    fits = not any(micro_batch_rules(name, num_stages, ranks, micro_batches))
    schedule = SCHEDULES[name]
    return schedule.torch_class if fits else schedule.torch_class_for_any_count
