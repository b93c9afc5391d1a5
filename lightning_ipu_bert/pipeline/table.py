"""The table "Device Allocation": the blocks of every stage."""

from __future__ import annotations

from itertools import groupby
from typing import Iterator, Mapping, Sequence

from lightning_ipu_bert.pipeline.blocks import series_of

TITLE = "Device Allocation"


def device_allocation(stages: Sequence[Sequence[str]], labels: Mapping[str, str]) -> str:
    """Return the table, one line per stage.

    Args:
        stages: The blocks of every stage.
        labels: Display names by block, or by series of numbered blocks; other blocks are listed
            by their own names.
    """
    rows = [", ".join(_describe(blocks, labels)) for blocks in stages]
    width = max(len(TITLE), *(len(row) + 7 for row in rows))
    lines = [f"{stage:>5}  {row}" for stage, row in enumerate(rows)]
    return "\n".join([TITLE, "-" * width, "stage  blocks", *lines, "-" * width])


def _describe(blocks: Sequence[str], labels: Mapping[str, str]) -> Iterator[str]:
    """Yield the names of the blocks of a stage; consecutive layers become a range."""
    for series, run in groupby(blocks, series_of):
        names = list(run)
        if series is None:
            yield from (labels.get(name, name) for name in names)
            continue
        first, last = (name.rpartition(".")[2] for name in (names[0], names[-1]))
        numbers = first if first == last else f"{first}-{last}"
        yield f"{labels.get(series, series)} {numbers}".strip()
