"""Features as flat arrays, from which batches are cut without a Python object per token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, List, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_ipu_bert.data.tokenized import IntArray, ranges, starts_of

if TYPE_CHECKING:
    import datasets
    import pyarrow

TOKENS = ("input_ids", "token_type_ids")
SCALARS = ("start_positions", "end_positions", "feature")


class FeatureTable(Dataset[Dict[str, object]]):
    """A dataset of features; rows are dictionaries as in the `datasets.Dataset`."""

    def __init__(self, features: datasets.Dataset) -> None:
        """Read the columns that batches consist of.

        Args:
            features: From `feature_cache.cached_features`.
        """
        columns = {n: features.data.column(n).combine_chunks() for n in TOKENS + SCALARS}
        lengths = columns["input_ids"].value_lengths().to_numpy(zero_copy_only=False)
        self.features = features
        self.lengths: IntArray = np.asarray(lengths, np.int64)
        """[F]: number of tokens of every feature."""
        self.starts = starts_of(self.lengths)
        """[F]: index of the first token of every feature."""
        self.tokens = {name: _numpy(columns[name].flatten()) for name in TOKENS}
        """[T]: columns with a value per token."""
        self.scalars = {name: _numpy(columns[name]) for name in SCALARS}
        """[F]: columns with a value per feature."""

    def __len__(self) -> int:
        """Return the number of features."""
        return len(self.lengths)

    @override
    def __getitem__(self, row: int) -> Dict[str, object]:
        """Return a row with all columns."""
        return dict(self.features[row])

    def __getitems__(self, rows: List[int]) -> FeatureRows:
        """Return several rows; called by the loaders of torch."""
        return FeatureRows(self, np.asarray(rows, np.int64))


class FeatureRows(NamedTuple):
    """Some rows of a table, not yet padded."""

    table: FeatureTable
    rows: IntArray

    def batch(self, pad_token_id: int, length: int) -> Dict[str, Tensor]:
        """Return the rows as a batch: see `loaders.Collator`.

        Args:
            pad_token_id: Token id of the padding.
            length: Length of the batch, which is longer if a row is.
        """
        counts = self.table.lengths[self.rows]
        where = ranges(self.table.starts[self.rows], counts)
        is_token = np.arange(max(int(counts.max()), length)) < counts[:, None]
        batch = {"attention_mask": is_token.astype(np.int64)}
        for name, padding in zip(TOKENS, (pad_token_id, 0)):
            batch[name] = np.full(is_token.shape, padding, np.int64)
            batch[name][is_token] = self.table.tokens[name][where]
        for name in SCALARS:
            batch[name] = self.table.scalars[name][self.rows].astype(np.int64)
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def _numpy(column: pyarrow.Array) -> npt.NDArray[np.generic]:
    values: npt.NDArray[np.generic] = column.to_numpy(zero_copy_only=False)
    return values
