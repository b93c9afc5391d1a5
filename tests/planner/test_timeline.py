"""Against a simulation by rules instead of orders, closed forms, and torch's own orders."""

from types import SimpleNamespace

import pytest

from lightning_ipu_bert.pipeline.schedules import SCHEDULES, Action, RankSlot, torch_class_of
from lightning_ipu_bert.planner.timeline import (
    Durations,
    bubble_fraction,
    idle_fractions,
    stash_depths,
    timeline,
)


def simulate_by_rules(schedule, stages, micro_batches, forward, backward):
    """Tick by tick, each stage does what the paper's rule says; no order is written down.

    gpipe: forwards while there are any, then backwards. 1f1b: a backward if one is ready, else a
    forward if fewer than (stages - stage) micro-batches are under way.
    Returns total time and the largest number of micro-batches under way in each stage.
    """
    forwards, backwards = [0] * stages, [0] * stages  # done
    busy, deepest = [None] * stages, [0] * stages
    time = 0
    while min(backwards) < micro_batches:
        for s in range(stages):  # what ends now
            if busy[s] and busy[s][1] == time:
                done = forwards if busy[s][0] == "F" else backwards
                done[s] += 1
                busy[s] = None
        for s in range(stages):
            if busy[s]:
                continue
            ready_f = forwards[s] < (forwards[s - 1] if s else micro_batches)
            ready_b = backwards[s] < (backwards[s + 1] if s + 1 < stages else forwards[s])
            if schedule == "gpipe":
                ready_b = ready_b and forwards[s] == micro_batches
            else:
                ready_f = ready_f and forwards[s] - backwards[s] < stages - s
            if ready_b:
                busy[s] = ("B", time + backward)
            elif ready_f:
                busy[s] = ("F", time + forward)
                deepest[s] = max(deepest[s], forwards[s] + 1 - backwards[s])
        time += 1
    return time - 1, deepest


CASES = [(p, m) for p in (1, 2, 3, 4, 7) for m in (1, 2, 4, 8, 13)]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "micro_batches"), CASES)
@pytest.mark.parametrize(("forward", "backward"), [(1, 2), (1, 1), (3, 5)])
def test_closed_forms_equal_a_simulation_by_rules(
    schedule, stages, micro_batches, forward, backward
):
    total, deepest = simulate_by_rules(schedule, stages, micro_batches, forward, backward)
    idle = 1 - micro_batches * (forward + backward) / total
    assert bubble_fraction(schedule, stages, 1, micro_batches) == pytest.approx(idle)
    assert stash_depths(schedule, stages, 1, micro_batches) == deepest

    events = timeline(schedule, stages, 1, micro_batches, [Durations(forward, backward)] * stages)
    assert max(event.end for event in events) == pytest.approx(total)
    assert idle_fractions(events) == pytest.approx([idle] * stages)


ALL = [
    ("gpipe", 3, 1, 5),
    ("1f1b", 4, 1, 6),
    ("interleaved_1f1b", 2, 2, 4),
    ("interleaved_1f1b", 4, 3, 8),
    ("interleaved_1f1b", 4, 2, 10),
    ("zero_bubble", 4, 1, 8),
    ("zero_bubble", 2, 2, 6),
]


@pytest.mark.parametrize(("schedule", "ranks", "per_rank", "micro_batches"), ALL)
def test_every_micro_batch_runs_once_everywhere_and_in_order(
    schedule, ranks, per_rank, micro_batches
):
    events = timeline(schedule, ranks, per_rank, micro_batches)
    ends = {event.action: event.end for event in events}
    assert len(ends) == len(events)
    stages = range(ranks * per_rank)
    halves = "IW" if schedule == "zero_bubble" else "B"
    assert set(ends) == {
        Action(s, kind, m) for s in stages for kind in "F" + halves for m in range(micro_batches)
    }
    for event in events:
        stage, kind, m = event.action
        assert event.rank == stage % ranks
        if kind == "F" and stage:
            assert ends[Action(stage - 1, "F", m)] <= event.start
        if kind in "BI":
            assert ends[Action(stage, "F", m)] <= event.start
            if stage + 1 in stages:
                assert ends[Action(stage + 1, kind, m)] <= event.start
        if kind == "W":
            assert ends[Action(stage, "I", m)] <= event.start
    for rank in range(ranks):
        mine = [event for event in events if event.rank == rank]
        assert all(a.end <= b.start for a, b in zip(mine, mine[1:]))


def test_interleaving_and_zero_bubble_shorten_the_bubble():
    plain = bubble_fraction("1f1b", 4, 1, 8)
    assert bubble_fraction("interleaved_1f1b", 4, 2, 8) < plain
    assert bubble_fraction("zero_bubble", 4, 1, 8) < plain


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zero_bubble"])
@pytest.mark.parametrize(
    ("ranks", "per_rank", "micro_batches"),
    [(2, 2, 4), (4, 2, 8), (4, 3, 12), (2, 2, 2), (4, 2, 10), (3, 2, 3), (4, 1, 8)],
)
def test_looped_orders_are_those_that_torch_runs(schedule, ranks, per_rank, micro_batches):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules", exc_type=ImportError)
    rounds = max(1, micro_batches // ranks)
    itself = SimpleNamespace(
        n_local_stages=per_rank,
        pp_group_size=ranks,
        microbatches_per_round=micro_batches // rounds,
        _n_microbatches=micro_batches,
    )
    for rank in range(ranks):
        kind = getattr(schedules, SCHEDULES[schedule].torch_class)
        theirs = kind._calculate_single_rank_operations(itself, rank)
        ours = SCHEDULES[schedule].order(RankSlot(rank, ranks, per_rank, micro_batches))
        assert ours == [
            (a.stage_index, a.computation_type.value, a.microbatch_index) for a in theirs if a
        ]


def test_the_timeline_knows_uneven_stages():
    # Two stages, the second twice as long: after the first forward it alone sets the pace.
    events = timeline("gpipe", 2, 1, 4, [Durations(1, 2), Durations(2, 4)])
    assert max(event.end for event in events) == 1 + 4 * 6 + 2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_torch_has_the_classes_of_the_table_and_numbers_that_do_not_fit_get_another(schedule):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules", exc_type=ImportError)
    entry = SCHEDULES[schedule]
    stages = 4 * entry.min_stages_per_rank
    fitting = torch_class_of(schedule, stages, 4, 8)
    ragged = torch_class_of(schedule, stages, 4, 1 if entry.fills_stages else 9)
    assert fitting == entry.torch_class
    assert ragged == entry.torch_class_for_any_count
    for name in (fitting, ragged):
        takes_list = issubclass(getattr(schedules, name), schedules.PipelineScheduleMulti)
        assert takes_list == entry.takes_stage_list
