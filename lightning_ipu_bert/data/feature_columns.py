"""Features as columns of an Arrow table: what is kept of them, in memory or in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Mapping, NamedTuple, Optional, Protocol

import numpy as np
import numpy.typing as npt

from lightning_ipu_bert.data.features import features_in_chunks
from lightning_ipu_bert.data.questions import QuestionSet
from lightning_ipu_bert.data.settings import Windowing

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

ROW_LENGTHS = {
    "input_ids": "counts",
    "token_type_ids": "counts",
    "offset_starts": "passage_counts",
    "offset_ends": "passage_counts",
}
"""List columns of features: the column with the lengths of their rows."""

SCALARS = ("start_positions", "end_positions", "question", "context_start")
"""Scalar columns of features; the index `feature` is added at the end."""


class Features(Protocol):
    """Features by columns: a `datasets.Dataset` of the cache, or `FeatureColumns`."""

    @property
    def data(self) -> Any:
        """The table, with `column(name)`."""


class FeatureColumns(NamedTuple):
    """Features in memory."""

    data: pyarrow.Table
    """A row per feature."""


def build_columns(
    question_set: QuestionSet,
    tokenizer: PreTrainedTokenizerBase,
    windowing: Windowing,
    description: Optional[str] = None,
) -> FeatureColumns:
    """Build the features of a split in memory, with a progress bar if `description` is given."""
    import pyarrow
    from tqdm.auto import tqdm

    tables: List[pyarrow.Table] = []
    total = len(question_set.questions)
    hidden = description is None
    with tqdm(total=total, desc=description, unit=" q", leave=False, disable=hidden) as progress:
        for done, columns in features_in_chunks(question_set, tokenizer, windowing):
            tables.append(_arrow_table(columns))
            progress.update(done)
    table = pyarrow.concat_tables(tables)
    rows = np.arange(table.num_rows, dtype=np.int32)
    return FeatureColumns(table.append_column("feature", [rows]))


def flat_column(features: Features, name: str) -> npt.NDArray[np.int64]:
    """Return a column as a flat array; rows of list columns are concatenated."""
    column = features.data.column(name).combine_chunks()
    values = column.flatten() if name in ROW_LENGTHS else column
    return np.asarray(values.to_numpy(zero_copy_only=False), np.int64)


def _arrow_table(columns: Mapping[str, npt.NDArray[np.int64]]) -> pyarrow.Table:
    import pyarrow

    arrays: Dict[str, pyarrow.Array] = {}
    for name, lengths in ROW_LENGTHS.items():
        bounds = np.concatenate([[0], np.cumsum(columns[lengths])]).astype(np.int32)
        kind = np.int8 if name == "token_type_ids" else np.int32
        arrays[name] = pyarrow.ListArray.from_arrays(bounds, columns[name].astype(kind))
    for name in SCALARS:
        arrays[name] = columns[name].astype(np.int32)
    return pyarrow.table(arrays)
