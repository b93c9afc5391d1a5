"""What a pipeline of processes gains and costs, on the cores of one machine.

    python scripts/bench_pipeline.py throughput   two ranks / one process with two threads
    python scripts/bench_pipeline.py time         what two ranks do with the time of an update
    python scripts/bench_pipeline.py reading      passing batches to the other stage / an update
    python scripts/bench_pipeline.py overhead     the strategy / a bare loop over torch's schedule
    python scripts/bench_pipeline.py one_stage    the strategy with one stage / plain Lightning
    python scripts/bench_pipeline.py idle         idle share of ranks / the predicted bubble
    python scripts/bench_pipeline.py rts          optimizer state of a rank, split over replicas
    python scripts/bench_pipeline.py stash        bytes held for the backward / the predicted ones

throughput, overhead and one_stage let the sides train blocks of updates in turn, and print the
median ratio of their speeds. The model has MiniLM's shape and random weights; sequences are 384
tokens (idle: 128) without padding; float32, no dropout; 16 micro-batches. Nothing else should run
beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any, Callable, Dict, List, Sequence

import tests_path  # noqa: F401
from pipeline_probes import (
    Done,
    Update,
    peak_stash,
    predicted_stash,
    state_bytes,
    transfer_seconds,
    watch_reading,
    watch_updates,
)
from pipeline_sides import (
    BERT_LARGE,
    LENGTH,
    MICRO_BATCHES,
    MINILM,
    Side,
    by_bare_loop,
    by_plain_lightning,
    by_strategy,
    compare,
)
from ranks import run_ranks

from lightning_ipu_bert.planner.timeline import (
    Durations,
    bubble_fraction,
    stash_depths,
    timeline,
)

FEW_WORDS = {**MINILM, "vocab_size": 64}
"""Equal stages: with few words the embeddings take no time."""
EVEN_MICRO_BATCH, EVEN_LENGTH = 4, 128
"""Shorter sequences keep a stage's times steadier; what varies adds to the idle share."""


def throughput(options: argparse.Namespace) -> None:
    """Compare ranks of one thread each to one process with as many threads."""
    common = {"micro_batch": options.micro_batch, "size": MINILM}
    schedules, parts = ("1f1b", "zero_bubble"), (1, MICRO_BATCHES)
    ranks = len(options.layers)
    sides = [
        *(
            Side(ranks, by_strategy, {**common, "layers": options.layers, "schedule": schedule})
            for schedule in schedules
        ),
        *(
            Side(1, by_plain_lightning, {**common, "threads": ranks, "parts": number})
            for number in parts
        ),
    ]
    seconds = compare(sides, options.pairs, options.updates)
    for schedule, pipeline in zip(schedules, seconds):
        for number, plain in zip(parts, seconds[len(schedules) :]):
            name = f"{schedule}, stages of {options.layers} layers / one process"
            show_ratio(f"{name}, batch in {number} parts", pipeline, plain)


def overhead(options: argparse.Namespace) -> None:
    """Compare the strategy to a bare loop over the same schedule of torch."""
    # With few words: the strategy's own way with large tables is not to hide what it costs.
    common = {"layers": options.layers, "micro_batch": options.micro_batch, "size": FEW_WORDS}
    sides = [
        Side(len(options.layers), by_strategy, common),
        Side(len(options.layers), by_bare_loop, common),
    ]
    ours, bare = compare(sides, options.pairs, options.updates)
    show_ratio(f"strategy with {options.layers} layers / bare loop over 1F1B", ours, bare)


def one_stage(options: argparse.Namespace) -> None:
    """Compare the strategy with one stage to plain Lightning with as many micro-batches."""
    size = BERT_LARGE if options.large else MINILM
    device = {"accelerator": options.accelerator, "precision": options.precision}
    common = {"micro_batch": options.micro_batch, "size": size, **device}
    sides = [
        Side(1, by_strategy, {**common, "layers": [size["num_hidden_layers"]]}),
        # Lightning gives the cores of a machine to the ranks on it: here all to one.
        Side(1, by_plain_lightning, {**common, "parts": MICRO_BATCHES, "threads": os.cpu_count()}),
    ]
    ours, plain = compare(sides, options.pairs, options.updates)
    show_ratio("strategy with one stage / plain Lightning", ours, plain)


def show_ratio(what: str, ours: List[float], theirs: List[float]) -> None:
    """Print the median of how many times as fast the first is, and the spread."""
    ratios = [b / a for a, b in zip(ours, theirs)]
    print(
        f"{what}: {statistics.median(ratios):.3f} times as fast "
        f"({min(ratios):.3f} .. {max(ratios):.3f}, {len(ratios)} pairs; "
        f"{statistics.median(ours):.2f} s and {statistics.median(theirs):.2f} s)",
        flush=True,
    )


# --- time of the ranks ----------------------------------------------------------------------------


def time_of_ranks(options: argparse.Namespace) -> None:
    """Print what two ranks do with the time of an update."""
    plan = {"layers_per_stage": options.layers, "gradient_accumulation_steps": MICRO_BATCHES}
    watched = run_ranks(
        2, watch_updates, MINILM, plan, options.micro_batch, options.pairs, timeout=1200
    )
    transfer = max(run_ranks(2, transfer_seconds, options.micro_batch))
    parts = [parts_of(list(updates), transfer) for updates in zip(*watched)]
    print(f"one update of {options.layers} by 1f1b, shares of its time on a rank, in the mean:")
    for name in parts[0]:
        shares = [part[name] for part in parts]
        print(f"  {name:<50}{percent(shares):>24}")
    print(f"a hidden state takes {1000 * transfer:.2f} ms from one idle rank to the other")


def reading(options: argparse.Namespace) -> None:
    """Print the share of an update in which batches are passed on and compared."""
    plan = {"layers_per_stage": options.layers, "gradient_accumulation_steps": MICRO_BATCHES}
    watched = run_ranks(
        2, watch_reading, MINILM, plan, options.micro_batch, options.pairs, timeout=1200
    )
    for rank, updates in enumerate(watched):
        shares = [exchange / total for exchange, total in updates]
        median = statistics.median(exchange for exchange, _ in updates)
        print(f"rank {rank}: {percent(shares)} of an update, {1000 * median:.2f} ms", flush=True)


def parts_of(updates: Sequence[Update], transfer: float) -> Dict[str, float]:
    """Part the time of one update of all ranks; the shares sum up to 1."""
    ranks, total = len(updates), max(u.end for u in updates) - min(u.begin for u in updates)
    actions = [action for update in updates for action in update.actions]
    real = [durations_of(actions, stage) for stage in range(ranks)]
    mean = Durations(*(sum(values) / ranks for values in zip(*real)))
    work = MICRO_BATCHES * (mean.forward + mean.backward)
    even, uneven = (makespan(ranks, durations) for durations in ([mean] * ranks, real))
    optimizer = statistics.mean(u.end - u.optimizer for u in updates)
    schedule, transfers = span(actions), MICRO_BATCHES * transfer
    seconds = {
        "forwards and backwards": work,
        "bubble of these, if stages were even": even - work,
        "uneven stages": uneven - even,
        "transfer, a hidden state or gradient a micro-batch": transfers,
        "unevenness between micro-batches (remainder)": schedule - uneven - transfers,
        "optimizer": optimizer,
        "splitting, hooks, logging (remainder)": total - schedule - optimizer,
    }
    return {name: value / total for name, value in seconds.items()}


def durations_of(actions: Sequence[Done], stage: int) -> Durations:
    """Return the mean durations of a stage's actions."""
    means = [
        statistics.mean(a.end - a.begin for a in actions if (a.kind, a.stage) == (kind, stage))
        for kind in "FB"
    ]
    return Durations(*means)


def makespan(ranks: int, durations: Sequence[Durations]) -> float:
    return max(e.end for e in timeline("1f1b", ranks, 1, MICRO_BATCHES, durations))


def span(actions: Sequence[Done]) -> float:
    return max(action.end for action in actions) - min(action.begin for action in actions)


def idle(options: argparse.Namespace) -> None:
    """Print the measured idle time of every rank and the predicted bubble fraction."""
    for schedule in ("gpipe", "1f1b"):
        for micro_batches in (4, 8, 16):
            plan = {
                "layers_per_stage": [3, 3],
                "schedule": schedule,
                "gradient_accumulation_steps": micro_batches,
            }
            watched = run_ranks(
                *(2, watch_updates, FEW_WORDS, plan, EVEN_MICRO_BATCH),
                *(options.pairs, EVEN_LENGTH),
                timeout=1200,
            )
            shares = [
                [
                    1 - busy(mine) / span([a for update in everyones for a in update.actions])
                    for mine, *everyones in zip(own, *watched)
                ]
                for own in watched
            ]
            predicted = bubble_fraction(schedule, 2, 1, micro_batches)
            off = max(abs(statistics.median(of_rank) - predicted) for of_rank in shares)
            print(
                f"{schedule:<6}{micro_batches:>3} micro-batches: idle "
                f"{' and '.join(map(percent, shares))}; predicted {100 * predicted:.1f} %; "
                f"off by {100 * off:.1f} points at most",
                flush=True,
            )


def percent(shares: Sequence[float]) -> str:
    low, high = min(shares), max(shares)
    return f"{100 * statistics.median(shares):.1f} % ({100 * low:.1f} .. {100 * high:.1f})"


def busy(update: Update) -> float:
    return sum(action.end - action.begin for action in update.actions)


# --- memory of the ranks --------------------------------------------------------------------------


def rts(options: argparse.Namespace) -> None:
    """Print the optimizer state of the ranks with RTS over that without."""
    for stages, replicas in ((1, 2), (1, 4), (2, 2)):
        plan = {"layers_per_stage": [-1] * stages, "replication_factor": replicas}
        plan["gradient_accumulation_steps"] = stages
        full = run_ranks(stages * replicas, state_bytes, plan, timeout=600)
        plan["replicated_tensor_sharding"] = True
        split = run_ranks(stages * replicas, state_bytes, plan, timeout=600)
        ratios = ", ".join(f"{a / b:.4f}" for a, b in zip(split, full))
        print(f"{stages} x {replicas}: state with RTS / without, by rank: {ratios}", flush=True)


def stash(options: argparse.Namespace) -> None:
    """Print the peak of the stash in bytes and the predicted one."""
    tokens = options.micro_batch * LENGTH
    for schedule in ("gpipe", "1f1b"):
        depths = stash_depths(schedule, 2, 1, MICRO_BATCHES)
        for recompute in (False, True):
            plan = {
                "layers_per_stage": [3, 3],
                "schedule": schedule,
                "gradient_accumulation_steps": MICRO_BATCHES,
                "recompute_checkpoint_every_layer": recompute,
            }
            held = run_ranks(2, peak_stash, FEW_WORDS, plan, options.micro_batch, timeout=600)
            for stage, (depth, measured) in enumerate(zip(depths, held)):
                of_one = predicted_stash(3, stage == 0, stage == 1, tokens, recompute)
                print(
                    f"{schedule:<6}{'recomputed' if recompute else '':<11}stage {stage}: "
                    f"{measured / 2**20:8.2f} MiB held, {depth * of_one / 2**20:8.2f} MiB "
                    f"predicted, ratio {measured / (depth * of_one):.3f}",
                    flush=True,
                )


VERBS: Dict[str, Callable[[argparse.Namespace], None]] = {
    "throughput": throughput,
    "time": time_of_ranks,
    "reading": reading,
    "overhead": overhead,
    "one_stage": one_stage,
    "idle": idle,
    "rts": rts,
    "stash": stash,
}


def main() -> None:
    parser: Any = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("verb", choices=list(VERBS))
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 3], help="of every stage")
    parser.add_argument("--micro_batch", type=int, default=2, help="examples")
    parser.add_argument("--pairs", type=int, default=7, help="turns, or updates that are watched")
    parser.add_argument("--updates", type=int, default=1, help="in a turn")
    parser.add_argument("--large", action="store_true", help="one_stage: BERT-Large's shape")
    parser.add_argument("--accelerator", default="cpu", help="one_stage: of the Trainer")
    parser.add_argument("--precision", default="32-true", help="one_stage: of the Trainer")
    options = parser.parse_args()
    VERBS[options.verb](options)


if __name__ == "__main__":
    main()
