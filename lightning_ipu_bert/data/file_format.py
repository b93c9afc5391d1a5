"""What a file format is; the formats themselves are in `formats/`, one file each."""

from __future__ import annotations

from typing import Callable, Iterator, NamedTuple, Tuple

from lightning_ipu_bert.data.records import Record


class FileFormat(NamedTuple):
    """A way to read questions from a file."""

    suffixes: Tuple[str, ...]
    """Ends of the names of its files, with the dot and in lower case, e.g. ``(".json",)``."""
    records: Callable[[str], Iterator[Record]]
    """Yields the questions of the file at a path; raises UserError where it is not such a file."""
