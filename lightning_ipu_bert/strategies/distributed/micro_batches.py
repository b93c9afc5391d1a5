"""Micro-batches of a batch, and the weights of their losses in the loss of the global batch."""

from __future__ import annotations

from typing import List, NamedTuple, Optional

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_ipu_bert.examples import EntryMemo, count_examples, split_batch
from lightning_ipu_bert.pipeline.batches import equal_micro_batches
from lightning_ipu_bert.pipeline.protocol import PipelineModule, has_own_weights
from lightning_ipu_bert.strategies.distributed.mesh import Mesh

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class MicroBatches(NamedTuple):
    """The micro-batches of a batch, which have the same size."""

    parts: List[object]
    size: int
    """Examples of a micro-batch."""


def micro_batches_of(
    batch: object,
    gradient_accumulation_steps: int,
    least: int = 1,
    memo: Optional[EntryMemo] = None,
) -> MicroBatches:
    """Split a batch into micro-batches of equal size.

    Args:
        batch: The batch of a replica.
        gradient_accumulation_steps: Planned number of micro-batches.
        least: Least size of a micro-batch: 2 for training with BatchNorm, which has no variance of
            one example. The last examples are left out where there is no such size.
        memo: See `split_batch`.
    """
    examples = count_examples(batch, memo)
    planned = max(-(-examples // gradient_accumulation_steps), least)
    sizes = (equal_micro_batches(used, planned)[1] for used in range(examples, 0, -1))
    size = next((size for size in sizes if size >= least), 1)
    if examples % size:
        rank_zero_warn(
            f"A batch of {examples} examples cannot be split into equal micro-batches of 2 or more,"
            f" which BatchNorm needs: the last {examples % size} of it is not trained on. Set "
            "drop_last=True in the loader to leave out all of it."
        )
    return MicroBatches(split_batch(batch, examples, size, memo), size)


def of_other_size(micro_batches: MicroBatches, batch: object, memo: EntryMemo) -> object:
    """Return a micro-batch with another number of examples, if the batch has more than one.

    Args:
        micro_batches: The micro-batches.
        batch: The batch.
        memo: See `split_batch`.
    """
    examples, size = count_examples(batch, memo), micro_batches.size
    other = size - 1 if size > 1 else 2
    return split_batch(batch, examples, other, memo)[0] if other <= examples else batch


def least_size(model: nn.Module) -> int:
    """Return the least size of a micro-batch that a model can train on."""
    return 2 if any(isinstance(part, BATCH_NORMS) for part in model.modules()) else 1


def loss_weights(
    model: PipelineModule, micro_batches: MicroBatches, mesh: Mesh, device: torch.device
) -> List[float]:
    """Return the weights of the losses of micro-batches in the gradient of this replica.

    Gradients are averaged over replicas (`gradients.average_gradients`), so that the weights of all
    replicas add up to the number of replicas; to 0 if no micro-batch has a weight.

    Args:
        model: Weights its batches.
        micro_batches: The micro-batches of this replica.
        mesh: Mesh coordinates and groups of this rank.
        device: Device of the collectives.
    """
    weights = [float(micro_batches.size)] * len(micro_batches.parts)
    if has_own_weights(model):
        weights = [float(model.batch_weight(micro_batch)) for micro_batch in micro_batches.parts]
    total = torch.tensor(sum(weights), dtype=torch.float64, device=device)
    dist.all_reduce(total, group=mesh.replica_group)
    replicas = dist.get_world_size(mesh.replica_group)
    return [weight * replicas / float(total) if weight else 0.0 for weight in weights]
