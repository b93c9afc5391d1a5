"""Gradient all-reduce (mean) over replicas."""

from __future__ import annotations

from typing import Callable, Iterable, Iterator, List, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

T = TypeVar("T")

BUCKET_BYTES = 64 << 20
"""Size of a bucket of gradients in bytes."""


def averaged_after(
    closure: Callable[[], T], optimizer: Optimizer, group: dist.ProcessGroup
) -> Callable[[], T]:
    """Return a closure that also averages the gradients of an optimizer over replicas.

    Args:
        closure: Computes the gradients of this replica.
        optimizer: Holds the parameters.
        group: The ranks that hold the same stages, one per replica.
    """

    def averaged() -> T:
        result = closure()
        average_gradients([p for g in optimizer.param_groups for p in g["params"]], group)
        return result

    return averaged


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Replace every gradient by its mean over the group.

    A gradient that is missing on some ranks counts as zero there (experts, heads of tasks); one
    that is missing on all remains None, so that the optimizer skips the parameter.
    """
    count = dist.get_world_size(group)
    held = [parameter for parameter in parameters if not parameter.is_meta]
    if count == 1 or not held:
        return
    present = torch.tensor([p.grad is not None for p in held], dtype=torch.uint8)
    present = present.to(held[0].device)
    dist.all_reduce(present, dist.ReduceOp.MAX, group)
    for parameter, elsewhere in zip(held, present.tolist()):
        if elsewhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in held if p.grad is not None]
    for gradient in gradients:
        if gradient.is_sparse:
            _average_sparse(gradient, count, group)
    for bucket in _buckets([gradient for gradient in gradients if not gradient.is_sparse]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).div_(count)
        dist.all_reduce(flat, group=group)
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts):
            gradient.copy_(part.view_as(gradient))


def _average_sparse(gradient: Tensor, count: int, group: dist.ProcessGroup) -> None:
    """Replace a sparse gradient, of an embedding with `sparse=True`, by its mean."""
    dense = gradient.to_dense().div_(count)
    dist.all_reduce(dense, group=group)
    mean = dense.to_sparse(gradient.sparse_dim())
    gradient.sparse_resize_and_clear_(gradient.shape, gradient.sparse_dim(), gradient.dense_dim())
    gradient.add_(mean)


def _buckets(gradients: List[Tensor]) -> Iterator[List[Tensor]]:
    """Yield buckets of gradients of one dtype and about `BUCKET_BYTES`."""
    for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
        bucket: List[Tensor] = []
        size = 0
        for gradient in gradients:
            if gradient.dtype == dtype:
                bucket.append(gradient)
                size += gradient.numel() * gradient.element_size()
            if size >= BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
