"""Logits of windows, collected from batches of different length.

Shapes: F windows, S sequence length, B windows of a batch.
"""

from __future__ import annotations

from typing import Iterable, NamedTuple, Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

Parts = Iterable[Sequence[npt.ArrayLike]]
"""Feature indices [B], start logits [B, S] and end logits [B, S] of each batch."""


class Logits(NamedTuple):
    """Logits of windows, in any order."""

    features: IntArray
    """[F]: index of the feature."""
    starts: FloatArray
    """[F, S]"""
    ends: FloatArray
    """[F, S]"""

    def part(self, first: int, end: int) -> Logits:
        """Return the windows `first` to `end` - 1."""
        rows = slice(first, end)
        return Logits(self.features[rows], self.starts[rows], self.ends[rows])


def join_logits(parts: Parts) -> Logits:
    """Join the logits of batches of different length, without duplicate windows.

    Args:
        parts: Feature indices [B], start logits [B, S] and end logits [B, S] of each batch.
            Windows that are repeated by distributed samplers are used once.
    """
    batches = [tuple(np.asarray(x) for x in part) for part in parts]
    width = max((starts.shape[1] for _, starts, _ in batches), default=0)

    def stack(which: int) -> FloatArray:
        padded = [
            np.pad(b[which], ((0, 0), (0, width - b[which].shape[1])), constant_values=-np.inf)
            for b in batches
        ]
        return np.concatenate(padded).astype(np.float32) if padded else np.zeros((0, 0), np.float32)

    features = np.concatenate([b[0] for b in batches]) if batches else np.zeros(0)
    unique, where = np.unique(features.astype(np.int64), return_index=True)
    return Logits(unique, stack(1)[where], stack(2)[where])
