"""Gradients of the replicas become one."""

from __future__ import annotations

from typing import Any, Iterable, Iterator, List

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 64 << 20
"""Gradients that are sent together; above some MB, larger ones gain nothing."""


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], group: Any) -> None:
    """Replace every gradient by its mean over the group."""
    count = dist.get_world_size(group)
    if count == 1:
        return
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).div_(count)
        dist.all_reduce(flat, group=group)
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: List[Tensor]) -> Iterator[List[Tensor]]:
    """Part gradients of one dtype into buckets of about `BUCKET_BYTES`."""
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
