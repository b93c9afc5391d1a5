"""`FileFormat`; the formats are in `formats/`, one module each."""

from __future__ import annotations

from typing import Callable, Iterator, NamedTuple, Tuple

from lightning_ipu_bert.data.records import Record


class FileFormat(NamedTuple):
    """A format of files with questions."""

    suffixes: Tuple[str, ...]
    """Suffixes of file names in lower case, e.g. ``(".json",)``."""
    records: Callable[[str], Iterator[Record]]
    """Yields the questions of a file; raises UserError if it is invalid."""
