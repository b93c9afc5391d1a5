"""Features as flat arrays, from which batches are cut without a Python object per token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, List, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_ipu_bert.data.feature_columns import Features
from lightning_ipu_bert.data.tokenized import IntArray, ranges, starts_of

if TYPE_CHECKING:
    import pyarrow

TOKENS = ("input_ids", "token_type_ids")
SCALARS = ("start_positions", "end_positions", "feature")


class FeatureTable(Dataset[Dict[str, object]]):
    """A dataset of features; rows are dictionaries of all columns."""

    def __init__(self, features: Features, longest_first: bool = False) -> None:
        """Read the columns that batches consist of.

        Args:
            features: From `cached_features` or `build_columns`.
            longest_first: Sort the rows by their number of tokens; otherwise they stay in order.
        """
        columns = {n: features.data.column(n).combine_chunks() for n in TOKENS + SCALARS}
        lengths = columns["input_ids"].value_lengths().to_numpy(zero_copy_only=False)
        in_file: IntArray = np.asarray(lengths, np.int64)
        self.features = features
        self.order: IntArray = np.arange(len(in_file))
        """[F]: index in the dataset of every row."""
        if longest_first:
            self.order = np.argsort(-in_file, kind="stable")
        self.lengths: IntArray = in_file[self.order]
        """[F]: number of tokens of every row."""
        self.starts: IntArray = starts_of(in_file)[self.order]
        """[F]: index of the first token of every row."""
        self.tokens = {name: _numpy(columns[name].flatten()) for name in TOKENS}
        """[T]: columns with a value per token, in the order of the dataset."""
        self.scalars = {name: _numpy(columns[name])[self.order] for name in SCALARS}
        """[F]: columns with a value per row."""

    def __len__(self) -> int:
        """Return the number of features."""
        return len(self.lengths)

    @override
    def __getitem__(self, row: int) -> Dict[str, object]:
        """Return a row with all columns."""
        columns = self.features.data.slice(int(self.order[row]), 1).to_pydict()
        return {name: values[0] for name, values in columns.items()}

    def __getitems__(self, rows: List[int]) -> FeatureRows:
        """Return several rows; called by the loaders of torch."""
        return FeatureRows(self, np.asarray(rows, np.int64))


class FeatureRows(NamedTuple):
    """Some rows of a table, not yet padded."""

    table: FeatureTable
    rows: IntArray

    @property
    def counts(self) -> IntArray:
        """[B]: number of tokens of every row."""
        return self.table.lengths[self.rows]

    def batch(self, pad_token_id: int, length: int) -> Dict[str, Tensor]:
        """Return the rows as a batch: see `loaders.Collator`.

        Args:
            pad_token_id: Token id of the padding.
            length: Length of the batch, at least that of every row.
        """
        where = ranges(self.table.starts[self.rows], self.counts)
        is_token = np.arange(length) < self.counts[:, None]
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
