"""Comparison of the batches of a replica's ranks: different ones would train a wrong model."""

from __future__ import annotations

import zlib
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ipu_bert.batch_trees import leaves_of
from lightning_ipu_bert.errors import UserError

FIRST, EVERY = 10, 100
"""The first batches are compared, and then every 100th."""


class BatchComparison:
    """Compares what the ranks of a replica pass to `run_loss` and `run_output`."""

    def __init__(self, group: dist.ProcessGroup, step: Callable[[], int]) -> None:
        """Create the comparison.

        Args:
            group: The ranks of the replica; CPU tensors.
            step: Returns the number of weight updates so far, for the message.
        """
        self.group = group
        self.step = step
        self.count = 0

    def __call__(self, batch: object) -> None:
        """Compare a batch with those of the other ranks.

        Raises:
            UserError: If they differ.
        """
        self.count += 1
        due = self.count <= FIRST or self.count % EVERY == 0
        if not due or dist.get_world_size(self.group) == 1:
            return
        own = torch.tensor(fingerprint(batch))
        found = [torch.zeros_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(found, own, self.group)
        others = [dist.get_global_rank(self.group, i) for i, x in enumerate(found) if x != found[0]]
        if others:
            first = dist.get_global_rank(self.group, 0)
            raise UserError(
                f"In step {self.step()} rank {first} and rank {', '.join(map(str, others))} of one "
                "replica have different batches. A step must not change its batch by the rank, by "
                "the time, or by random numbers of a generator of its own: use the global "
                "generators of torch, numpy or random."
            )


def fingerprint(batch: object) -> int:
    """Return a checksum of the tensors, arrays, numbers and texts in a batch."""
    checksum = 0
    for leaf in leaves_of(batch):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            checksum = zlib.crc32(
                _bytes(leaf), zlib.crc32(repr(tuple(leaf.shape)).encode(), checksum)
            )
        elif isinstance(leaf, np.ndarray) and leaf.dtype != object:
            checksum = zlib.crc32(leaf.tobytes(), checksum)
        elif isinstance(leaf, (str, bytes, int, float, bool, type(None))):
            checksum = zlib.crc32(repr(leaf).encode(), checksum)
    return checksum


def _bytes(tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous().reshape(-1)
    return content.view(torch.uint8).numpy().tobytes()
