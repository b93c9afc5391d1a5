"""Lightning's loaders: private names.

Files are relative to https://github.com/Lightning-AI/pytorch-lightning/tree/master/src/lightning.

- `_update_dataloader` (pytorch/utilities/data.py): a loader of any class with a new sampler.
  No public API in 2.6.
- `_IndexBatchSamplerWrapper`, `_batch_sampler` (pytorch/overrides/distributed.py): `predict`
  wraps batch samplers. No public API in 2.6.
- `sys._getframe`: who iterates over a loader; a loop of the Trainer does so on all ranks.
"""

from __future__ import annotations

import sys
from typing import Any, List

from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, Sampler


def with_sampler(loader: DataLoader[object], sampler: Sampler[object]) -> DataLoader[object]:
    """Return a copy of a loader with a new sampler, as created by Lightning."""
    return _update_dataloader(loader, sampler)


def iterated_by_a_loop() -> bool:
    """Return whether a loop of the Trainer has called the `__iter__` that calls this function.

    Loops iterate on all ranks, over a CombinedLoader; a callback may do so on one rank only.
    """
    caller = sys._getframe(2)
    return caller.f_globals.get("__name__") == CombinedLoader.__module__


def unwrapped_batch_sampler(sampler: object) -> Any:
    """Return the batch sampler of the user, which Lightning wraps for `predict`."""
    if isinstance(sampler, _IndexBatchSamplerWrapper):
        return sampler._batch_sampler
    return sampler


def indices_drawn(loader: object, iterated: bool) -> List[object]:
    """Return the list in which `predict` records the indices of batches; elsewhere an empty one.

    Args:
        loader: The loader.
        iterated: Whether its iterator exists in this process, and records; otherwise the list is
            created.
    """
    sampler = loader.batch_sampler if isinstance(loader, DataLoader) else None
    if not isinstance(sampler, _IndexBatchSamplerWrapper):
        return []
    if not iterated:
        sampler.seen_batch_indices = []
    drawn: List[object] = vars(sampler).get("seen_batch_indices", [])
    return drawn


def record_indices(loader: DataLoader[object], like: DataLoader[object]) -> None:
    """Record the indices of batches for `predict` if the loader `like` does so."""
    sampler: Any = loader.batch_sampler
    if isinstance(like.batch_sampler, _IndexBatchSamplerWrapper):
        wrapper = _IndexBatchSamplerWrapper(sampler)
        object.__setattr__(loader, "batch_sampler", wrapper)  # torch guards the attribute
