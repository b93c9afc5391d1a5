"""Loaders on ranks: shares of replicas, divisible batches, no repeated examples in evaluation."""

from __future__ import annotations

import os
from functools import partial
from itertools import islice
from typing import Iterable, Iterator, Tuple

from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler
from typing_extensions import override

from lightning_ipu_bert._compat.datasets import share_of
from lightning_ipu_bert._compat.loaders import (
    share_predictions,
    undivided_sampler,
    with_sampler,
)
from lightning_ipu_bert.batch_trees import has_rows, leaves_of
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.examples import count_examples
from lightning_ipu_bert.pipeline.batches import BatchAlgebra, batch_size_rule
from lightning_ipu_bert.pipeline.rules import Violation, enforce


def loader_rules(loaders: object, batches: BatchAlgebra) -> Iterator[Violation]:
    """Batches of loaders must be divisible into the micro-batches of a replica.

    Args:
        loaders: A loader or a collection; other objects than DataLoaders are not checked.
        batches: The batch algebra.
    """
    for loader in leaves_of(loaders):
        if isinstance(loader, DataLoader) and loader.batch_size is not None:
            yield from batch_size_rule(loader.batch_size, batches.gradient_accumulation_steps)


def share_rule(loader: DataLoader[object], replica: int, replicas: int) -> Iterator[Violation]:
    """Data must be divided among replicas: by global ranks, only a part of it would be read."""
    for what, rank, number in _shares(loader):
        if number > 1 and (rank, number) != (replica, replicas):
            yield Violation(
                what,
                (rank, number),
                f"divides the data among {number} processes, but the ranks of a replica read the "
                f"same data, and this is replica {replica} of {replicas}",
                "Use trainer.distributed_sampler_kwargs, which has num_replicas and rank.",
            )


def _shares(loader: DataLoader[object]) -> Iterator[Tuple[str, int, int]]:
    """Yield what divides the data of a loader, with its rank and number of processes."""
    batches = loader.batch_sampler
    inner = batches.sampler if isinstance(batches, BatchSampler) else None
    for sampler in {id(s): s for s in (loader.sampler, batches, inner)}.values():
        if isinstance(sampler, DistributedSampler):
            yield "DistributedSampler(rank, num_replicas)", sampler.rank, sampler.num_replicas
    share = share_of(loader.dataset)
    if share is not None:
        yield "split_dataset_by_node(rank, world_size)", share[0], share[1]


def check_examples(batch: object, loader: object, is_first: bool) -> None:
    """Check that the first dimension of a batch is its examples, where a loader says how many.

    Args:
        batch: A batch of the loader.
        loader: The loader.
        is_first: Whether it is the first batch, which is no remainder.

    Raises:
        UserError: If the first dimension is something else, e.g. the time.
    """
    sampler = loader.batch_sampler if isinstance(loader, DataLoader) else None
    if not isinstance(sampler, BatchSampler):
        return
    size = sampler.batch_size
    arrays = [leaf for leaf in leaves_of(batch) if has_rows(leaf)]
    lengths = [len(rows) for rows in arrays]
    if not lengths:
        return
    examples = count_examples(batch)
    wrong = [a for a in arrays if a.ndim > 1 and len(a) != examples == a.shape[1] > 1]
    if examples > size or (examples < size and is_first and size in lengths):
        wrong = arrays
    if wrong:
        raise UserError(
            f"A batch of a loader with batch_size={size} has a tensor of shape "
            f"{list(wrong[0].shape)}: the first dimension must be the examples, along which a batch"
            " is split into micro-batches. Put it first, e.g. by batch_first=True."
        )


def loader_of_replica(
    loader: Iterable[object],
    batches: BatchAlgebra,
    replica: int,
    stage: RunningStage,
    divides: bool,
    any_size: bool = False,
) -> Iterable[object]:
    """Return a loader sharded over replicas, without repeated examples in evaluation.

    Lightning's sampler for evaluation repeats examples so that all replicas have the same number,
    and their scores would count twice. Replicas may have different numbers of batches.

    Args:
        loader: The loader as created by the Trainer.
        batches: The batch algebra.
        replica: Index of the replica of this rank.
        stage: What its batches are for.
        divides: Whether data is divided by Lightning, and not by the user.
        any_size: Whether batches may have any size, which is being tuned.

    Raises:
        UserError: If training batches are not divisible into micro-batches, or the data is divided
            among other processes than replicas.
    """
    training, replicas = stage == RunningStage.TRAINING, batches.replication_factor
    if training and not any_size:
        enforce(loader_rules(loader, batches))
    if not isinstance(loader, DataLoader):
        return loader
    enforce(share_rule(loader, replica, replicas))
    if int(os.environ.get("PL_SEED_WORKERS", 0)) and loader.worker_init_fn is None:
        # Lightning would seed workers by the global rank.
        loader.worker_init_fn = partial(pl_worker_init_function, rank=replica)
    if stage == RunningStage.PREDICTING and divides:
        share_predictions(loader, partial(ReplicaShare, replica=replica, replicas=replicas))
    if training or stage == RunningStage.PREDICTING:
        return loader
    whole = undivided_sampler(loader.sampler)
    return loader if whole is None else with_sampler(loader, ReplicaShare(whole, replica, replicas))


class ReplicaShare(Sampler[object]):
    """Every n-th index of a sampler, or batch of indices, without repetitions."""

    def __init__(self, sampler: Iterable[object], replica: int, replicas: int) -> None:
        """Create the share of a replica.

        Args:
            sampler: The indices of all replicas.
            replica: Index of the replica.
            replicas: Number of replicas.
        """
        self.sampler = sampler
        self.replica, self.replicas = replica, replicas

    @override
    def __iter__(self) -> Iterator[object]:
        """Yield the indices of the replica."""
        return islice(iter(self.sampler), self.replica, None, self.replicas)

    def __len__(self) -> int:
        """Return the number of indices, if that of the sampler is known."""
        count = len(self.sampler)  # type: ignore[arg-type]
        return len(range(self.replica, count, self.replicas))
