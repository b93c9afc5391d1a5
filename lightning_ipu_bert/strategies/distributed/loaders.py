"""Loaders on ranks: batches that divide into micro-batches, and evaluation without repeats."""

from __future__ import annotations

from typing import Any, Iterator

from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ipu_bert._compat.lightning import with_sampler
from lightning_ipu_bert.pipeline.batches import BatchAlgebra, batch_size_rule
from lightning_ipu_bert.pipeline.rules import Violation, enforce
from lightning_ipu_bert.strategies.batch_trees import leaves_of


def loader_rules(loaders: Any, batches: BatchAlgebra) -> Iterator[Violation]:
    """Batches of loaders are divisible into the micro-batches of a replica.

    Args:
        loaders: One, or a collection of some; what is no DataLoader counts as right.
        batches: What an update consists of.
    """
    for loader in leaves_of(loaders):
        if isinstance(loader, DataLoader) and loader.batch_size is not None:
            yield from batch_size_rule(loader.batch_size, batches.gradient_accumulation_steps)


def loader_of_replica(loader: object, batches: BatchAlgebra, training: bool) -> object:
    """Return a loader that shares its examples among replicas; in evaluation each exactly once.

    Lightning's sampler for evaluation repeats some, so that all replicas have equally many; their
    scores would count twice. Replicas of a pipeline need not have equally many batches.

    Args:
        loader: As the Trainer has made it.
        batches: What an update consists of.
        training: Whether it is for training.

    Raises:
        UserError: If training batches are not divisible into micro-batches.
    """
    if training:
        enforce(loader_rules(loader, batches))
        return loader
    if not isinstance(loader, DataLoader):
        return loader
    sampler = loader.sampler
    if type(sampler) is not DistributedSampler:
        return loader
    unrepeated = UnrepeatedDistributedSampler(
        sampler.dataset, sampler.num_replicas, sampler.rank, shuffle=False
    )
    return with_sampler(loader, unrepeated)
