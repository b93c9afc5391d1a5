"""Blocks to stages: the one function that executors, planner and tables ask.

A block is a named part of a model that is placed as a whole. Blocks whose names are alike but for a
number at the end (``bert.encoder.layer.0``, ``bert.encoder.layer.1``, ...) are the layers, which
`layers_per_stage` counts.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Iterator, List, Mapping, NamedTuple, Optional, Sequence

from lightning_ipu_bert.errors import UserError

NUMBERED = re.compile(r"((?P<series>.*)\.)?(?P<number>\d+)")


class Layers(NamedTuple):
    """The numbered blocks of a model."""

    first: int
    """Index of the first layer among the blocks."""
    number: int


def find_layers(blocks: Sequence[str]) -> Layers:
    """Return the longest run of blocks whose names differ only in the number at the end."""
    best = Layers(0, 0)
    index = 0
    for series, run in groupby(blocks, _series):
        count = len(list(run))
        if series is not None and count > best.number:
            best = Layers(index, count)
        index += count
    return best


def resolve_layers(layers_per_stage: Sequence[int], num_layers: int) -> List[int]:
    """Replace every -1 by an equal share of the remaining layers, the remainder on the last.

    Args:
        layers_per_stage: Layers of each stage; see `PipelineConfig`.
        num_layers: Layers of the model.

    Raises:
        UserError: If the numbers do not sum up to the model's layers.

    Source:
        `layers_per_ipu` of optimum-graphcore's IPUConfig, which counts in the same way.
    """
    wildcards = [i for i, n in enumerate(layers_per_stage) if n == -1]
    rest = num_layers - sum(n for n in layers_per_stage if n != -1)
    if rest < 0 or (rest and not wildcards):
        fixed = num_layers - rest
        raise UserError(
            f"layers_per_stage={list(layers_per_stage)} places {fixed} layers, but the model has "
            f"{num_layers}. Make the numbers sum up to {num_layers}, or put -1 for one of them."
        )
    resolved = list(layers_per_stage)
    for i in wildcards:
        resolved[i] = rest // len(wildcards)
    if wildcards:
        resolved[wildcards[-1]] += rest % len(wildcards)
    return resolved


def partition(blocks: Sequence[str], layers_per_stage: Sequence[int]) -> List[List[str]]:
    """Return the blocks of every stage, in forward order.

    Blocks before the layers lie on the first stage, blocks behind them on the last.

    Args:
        blocks: Names of all blocks in forward order.
        layers_per_stage: Layers of each stage; see `PipelineConfig`.

    Raises:
        UserError: If the numbers do not sum up, or a stage is left without a block.
    """
    first, count = find_layers(blocks)
    counts = resolve_layers(layers_per_stage, count)
    ends = [first + sum(counts[: stage + 1]) for stage in range(len(counts))]
    ends[-1] = len(blocks)
    stages = [list(blocks[a:b]) for a, b in zip([0, *ends], ends)]
    if not all(stages):
        raise UserError(
            f"layers_per_stage={list(layers_per_stage)} leaves stage {stages.index([])} without a "
            "block. Give it a layer, or use fewer stages (0 is possible at the ends, where other "
            "blocks lie)."
        )
    return stages


def device_allocation(stages: Sequence[Sequence[str]], labels: Mapping[str, str]) -> str:
    """Return the table "Device Allocation": what lies on which stage.

    Args:
        stages: The blocks of every stage.
        labels: What to call a block, or a series of numbered ones by the name before the number;
            their own names where there is none.
    """
    rows = [", ".join(_describe(blocks, labels)) for blocks in stages]
    width = max(len("Device Allocation"), *(len(row) + 7 for row in rows))
    lines = [f"{stage:>5}  {row}" for stage, row in enumerate(rows)]
    return "\n".join(["Device Allocation", "-" * width, "stage  blocks", *lines, "-" * width])


def _describe(blocks: Sequence[str], labels: Mapping[str, str]) -> Iterator[str]:
    """Name the blocks of one stage; consecutive layers become a range."""
    for series, run in groupby(blocks, _series):
        names = list(run)
        if series is None:
            yield from (labels.get(name, name) for name in names)
            continue
        first, last = (name.rpartition(".")[2] for name in (names[0], names[-1]))
        numbers = first if first == last else f"{first}-{last}"
        yield f"{labels.get(series, series)} {numbers}".strip()


def _series(block: str) -> Optional[str]:
    """Return the name before the number at the end, or None if there is no number."""
    match = NUMBERED.fullmatch(block)
    return match["series"] or "" if match else None
