"""Collation, order and resumable loading of features."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Union

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from lightning_ipu_bert.data.feature_table import FeatureRows

Batch = Dict[str, Tensor]
"""A batch of features; see `Collator`."""


class Collator:
    """Pads and stacks features.

    Returns ``input_ids``, ``attention_mask``, ``token_type_ids`` [B, S], and ``start_positions``,
    ``end_positions`` and ``feature`` (its index in the split) [B], all int64.
    """

    def __init__(
        self,
        pad_token_id: int,
        length: Optional[int] = None,
        multiple_of: int = 1,
        max_length: Optional[int] = None,
    ) -> None:
        """Create a collator.

        Args:
            pad_token_id: Token id of the padding.
            length: Length of every batch; None pads to the longest feature of each batch.
            multiple_of: Without `length`, batches are padded to a multiple of this.
            max_length: Length that padding to a multiple does not exceed; None is no limit.
        """
        self.pad_token_id = pad_token_id
        self.length = length
        self.multiple_of = multiple_of
        self.max_length = max_length

    def __call__(self, features: Union[FeatureRows, Sequence[Mapping[str, Any]]]) -> Batch:
        """Return a batch of rows of a dataset of features."""
        if isinstance(features, FeatureRows):
            return features.batch(self.pad_token_id, self._padded(int(features.counts.max())))
        counts = torch.tensor([len(f["input_ids"]) for f in features])
        length = self._padded(int(counts.max()))
        batch = {
            "input_ids": _stack([f["input_ids"] for f in features], self.pad_token_id, length),
            "attention_mask": (torch.arange(length) < counts[:, None]).long(),
            "token_type_ids": _stack([f["token_type_ids"] for f in features], 0, length),
        }
        for name in ("start_positions", "end_positions", "feature"):
            batch[name] = torch.tensor([f[name] for f in features])
        return batch

    def _padded(self, longest: int) -> int:
        """Return the length of a batch from that of its longest feature."""
        length = self.length or -(-longest // self.multiple_of) * self.multiple_of
        return max(longest, length if self.max_length is None else min(length, self.max_length))


def _stack(rows: List[List[int]], padding: int, length: int) -> Tensor:
    stacked = pad_sequence([torch.tensor(row) for row in rows], True, padding)
    return torch.nn.functional.pad(stacked, (0, length - stacked.shape[1]), value=padding)


class TrainingSampler(DistributedSampler):  # type: ignore[type-arg]  # not generic in torch 2.0
    """Draws the features of an epoch, shuffled by seed and epoch, optionally grouped by length.

    It is a `DistributedSampler`, so that Lightning sets its epoch and does not replace it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        group_by_length: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        """Create a sampler.

        Args:
            lengths: Number of tokens of every feature.
            batch_size: Batch size of a replica.
            group_by_length: Group features of similar length to reduce padding: within 50 global
                batches they are sorted by length.
            num_replicas: Number of replicas over which features are sharded.
            rank: Index of this replica.
            seed: Seed of the order; must be equal on all replicas.
        """
        super().__init__(lengths, num_replicas, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.lengths = lengths
        self.global_batch_size = batch_size * num_replicas
        self.group_by_length = group_by_length
        self.skipped = 0

    def skip(self, count: int) -> None:
        """Skip the first features of the next epoch."""
        self.skipped = count

    @override
    def __iter__(self) -> Iterator[int]:
        """Yield the features of this replica for the epoch."""
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        if self.group_by_length:
            from transformers.trainer_pt_utils import get_length_grouped_indices  # imports a lot

            grouped: Callable[..., List[int]] = get_length_grouped_indices
            order = grouped(self.lengths, self.global_batch_size, generator=generator)
        else:
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
        rounds = -(-self.total_size // len(order))
        order = (order * rounds)[: self.total_size]  # the same number on every replica
        first, self.skipped = self.skipped, 0
        return iter(order[self.rank :: self.num_replicas][first:])


class ResumableDataLoader(DataLoader):  # type: ignore[type-arg]  # not generic at run time
    """A stateful loader, which can resume in the middle of an epoch.

    Lightning saves the `state_dict` of such loaders in checkpoints and loads it when resuming.
    """

    _epoch: int = 0
    _batches: int = 0
    _resume_from: Optional[Dict[str, int]] = None

    @override
    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches of the epoch, without those before the point of resumption."""
        sampler = self.sampler
        self._epoch = sampler.epoch if isinstance(sampler, DistributedSampler) else 0
        self._batches = 0
        state, self._resume_from = self._resume_from, None
        if isinstance(sampler, TrainingSampler):
            if state and state["epoch"] == self._epoch and state["batches"] < len(self):
                self._batches = state["batches"]
            sampler.skip(self._batches * int(self.batch_size or 1))
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> Dict[str, int]:
        """Return the epoch and the number of its batches that were yielded."""
        return {"epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state: Dict[str, int]) -> None:
        """Resume from `state` in the next iteration, if it is for the same epoch."""
        self._resume_from = dict(state)
