"""The loss of a global batch: the losses of its parts by their weights."""

from __future__ import annotations

from typing import Protocol, Union

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from lightning_ipu_bert._compat.lightning import trainer_of
from lightning_ipu_bert.batch_trees import map_tree, tensors_of
from lightning_ipu_bert.errors import UserError


class Weighted(Protocol):
    """The loss of a `PipelineModule`."""

    def pipeline_loss(self, output: object, batch: object) -> object:
        """Return the loss of a micro-batch."""

    def batch_weight(self, batch: object) -> Union[float, Tensor]:
        """Return the weight of the loss of a micro-batch."""


def no_loss(output: object) -> Tensor:
    """Return the loss of a batch without weight: 0, whose gradients are 0.

    Args:
        output: The output of the model for the batch.
    """
    sums = [t.sum() for t in tensors_of(output) if t.is_floating_point()]
    return sum((total.nan_to_num(0.0, 0.0, 0.0) * 0 for total in sums), torch.zeros(()))


def detached(output: object) -> object:
    """Return an output whose tensors have no gradients."""
    return map_tree(output, lambda x: x.detach() if isinstance(x, Tensor) else x)


def loss_of(module: Weighted, output: object, batch: object, weighted: bool) -> Tensor:
    """Return the loss of a batch in this process.

    Args:
        module: A `PipelineModule`.
        output: Output of its last block.
        batch: The batch.
        weighted: Whether the module overrides `batch_weight`. If it is 0, the loss is 0.
    """
    if weighted and not float(module.batch_weight(batch)):
        return no_loss(output)
    return checked_loss(module, output, batch)


def checked_loss(module: Weighted, output: object, batch: object) -> Tensor:
    """Return the loss of a batch, which must be a scalar.

    Args:
        module: A `PipelineModule`.
        output: Output of its last block.
        batch: The batch.

    Raises:
        UserError: If it is something else, e.g. one loss per example.
    """
    loss = module.pipeline_loss(output, batch)
    if not isinstance(loss, Tensor) or loss.dim():
        what = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(
            f"{type(module).__name__}.pipeline_loss returns {what}, but must return a scalar "
            "tensor: the mean over the examples of the micro-batch, e.g. loss.mean()."
        )
    return loss


def global_loss(module: Weighted, output: object, batch: object, weighted: bool) -> Tensor:
    """Return the loss of the global batch, of which `batch` is the part of this process.

    Strategies like DDP average the gradients of all processes. The gradients of the result are
    those of this process times their number and its share of the total weight.

    Args:
        module: A `PipelineModule`.
        output: Output of its last block.
        batch: The batch of this process.
        weighted: Whether the module overrides `batch_weight`.

    Raises:
        UserError: If the Trainer adds up gradients of several batches: the weight of a batch in
            their sum is not known before the last of them.
    """
    loss = loss_of(module, output, batch, weighted)
    trainer = trainer_of(module) if isinstance(module, LightningModule) else None
    if trainer is None or not torch.is_grad_enabled():
        return loss
    if weighted and trainer.accumulate_grad_batches > 1:
        raise UserError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} cannot weight losses by "
            f"{type(module).__name__}.batch_weight, because the total is not known before the last "
            "batch. Use larger batches, or a pipeline strategy with gradient_accumulation_steps."
        )
    if not isinstance(trainer.strategy, ParallelStrategy) or not dist.is_initialized():
        return loss
    weight = torch.tensor(float(module.batch_weight(batch)), device=loss.device)
    total = weight.clone()
    dist.all_reduce(total)
    share = weight / total if total else weight
    mean = (loss.detach() * share).float()
    dist.all_reduce(mean)
    own = loss * (share * trainer.world_size)
    return own + (mean - own.detach())
