"""Loaders on ranks: divisible batches, and evaluation without repeated examples."""

from __future__ import annotations

from typing import Iterator

from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ipu_bert._compat.lightning import with_sampler
from lightning_ipu_bert.pipeline.batches import BatchAlgebra, batch_size_rule
from lightning_ipu_bert.pipeline.rules import Violation, enforce
from lightning_ipu_bert.strategies.batch_trees import leaves_of


def loader_rules(loaders: object, batches: BatchAlgebra) -> Iterator[Violation]:
    """Batches of loaders must be divisible into the micro-batches of a replica.

    Args:
        loaders: A loader or a collection; other objects than DataLoaders are not checked.
        batches: The batch algebra.
    """
    for loader in leaves_of(loaders):
        if isinstance(loader, DataLoader) and loader.batch_size is not None:
            yield from batch_size_rule(loader.batch_size, batches.gradient_accumulation_steps)


def loader_of_replica(loader: object, batches: BatchAlgebra, training: bool) -> object:
    """Return a loader sharded over replicas, without repeated examples in evaluation.

    Lightning's sampler for evaluation repeats examples so that all replicas have the same number,
    and their scores would count twice. Replicas may have different numbers of batches.

    Args:
        loader: The loader as created by the Trainer.
        batches: The batch algebra.
        training: Whether it is a training loader.

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
