"""Lightning's loaders: private names.

Files are relative to https://github.com/Lightning-AI/pytorch-lightning/tree/master/src/lightning.

- `_update_dataloader` (pytorch/utilities/data.py): a loader of any class with a new sampler.
  No public API in 2.6.
- `_IndexBatchSamplerWrapper`, `_batch_sampler` (pytorch/overrides/distributed.py): `predict`
  wraps batch samplers. No public API in 2.6.
- `_DatasetSamplerWrapper._sampler` (fabric/utilities/distributed.py): a sampler of the user that
  Lightning divides. No public API in 2.6.
- `Trainer._accelerator_connector` (pytorch/trainer/trainer.py): `use_distributed_sampler`. No
  public API in 2.6.
- `sys._getframe`: who iterates over a loader; a loop of the Trainer does so on all ranks.
"""

from __future__ import annotations

import copy
import sys
from typing import Any, Callable, Iterable, List, Optional

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Trainer
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Sampler,
)


def with_sampler(loader: DataLoader[object], sampler: Sampler[object]) -> DataLoader[object]:
    """Return a copy of a loader with a new sampler, as created by Lightning."""
    return _update_dataloader(loader, sampler)


def undivided_sampler(sampler: object) -> Optional[Iterable[object]]:
    """Return the indices that Lightning divides among processes; None if it does not.

    Lightning's samplers for evaluation repeat examples, and fail if there are too few.
    """
    dataset: Any = sampler.dataset if isinstance(sampler, DistributedSampler) else None
    if type(sampler) is DistributedSamplerWrapper:
        own: Iterable[object] = dataset._sampler
        return own
    return range(len(dataset)) if type(sampler) is DistributedSampler else None


def share_predictions(loader: DataLoader[object], share: Callable[[Iterable[object]], Any]) -> None:
    """Let a loader that Lightning has created for `predict` read a share of its examples.

    Args:
        loader: The loader; modified in place.
        share: Returns the share of indices, or of batches of indices.
    """
    wrapper: Any = loader.batch_sampler
    if not isinstance(wrapper, _IndexBatchSamplerWrapper) or _is_divided(loader):
        return
    batches: Any = copy.copy(wrapper._batch_sampler)
    if isinstance(batches, BatchSampler):
        batches.sampler = share(batches.sampler)
        wrapper._batch_sampler = batches
    else:
        wrapper._batch_sampler = share(batches)


def _is_divided(loader: DataLoader[object]) -> bool:
    samplers = (loader.sampler, sampler_of(loader))
    streams = isinstance(loader.dataset, IterableDataset)
    return streams or any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def sampler_of(loader: DataLoader[object]) -> object:
    """Return the sampler from which a loader creates its batches."""
    batches = unwrapped_batch_sampler(loader.batch_sampler)
    return batches.sampler if isinstance(batches, BatchSampler) else batches or loader.sampler


def divides_data(trainer: Trainer) -> bool:
    """Return whether Lightning divides data among processes (`use_distributed_sampler`)."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


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
