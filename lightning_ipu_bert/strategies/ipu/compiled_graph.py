"""A program, the batches that it was compiled for, and how other batches are made to fit."""

from __future__ import annotations

from typing import Any, List, Sequence, Tuple

import torch
from torch import Tensor

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.ipu_config import Graph
from lightning_ipu_bert.strategies.ipu.network import BatchLayout


class CompiledGraph:
    """A graph, and what it was compiled for."""

    def __init__(self, graph: Graph, poplar: Any, batch_size: int, layout: BatchLayout) -> None:
        """Create one.

        Args:
            graph: Its plan.
            poplar: PopTorch's executor.
            batch_size: Examples of a call.
            layout: Of its batches.
        """
        self.graph = graph
        self.poplar = poplar
        self.batch_size = batch_size
        self.layout = layout
        self.shapes: List[Tuple[torch.Size, torch.dtype]] = []

    def detach(self) -> None:
        """Give the IPUs back; weights, optimizer state and random state come to the host first."""
        if self.poplar.isCompiled() and self.poplar.isAttachedToDevice():
            self.poplar.detachFromDevice()

    def check(self, batch: Any, tensors: Sequence[Tensor]) -> None:
        """Check that a batch is as those that were compiled for.

        Raises:
            UserError: If it is not.
        """
        if BatchLayout.of(batch) != self.layout:
            raise UserError(
                "A batch has other entries than the first one, for which the program was compiled. "
                "Let all loaders of a stage give batches of one structure."
            )
        for found, expected in zip(examples_of(tensors), self.shapes):
            if found != expected:
                raise UserError(
                    f"A batch has examples of shape {list(found[0])} ({found[1]}), and the program "
                    f"was compiled for {list(expected[0])} ({expected[1]}). IPUs take one shape: "
                    "pad all examples to one length."
                )


def padded(tensors: Sequence[Tensor], first: int, size: int) -> List[Tensor]:
    """Return `size` examples from `first` on; where they end, the last one is repeated."""
    if not first and len(tensors[0]) == size:
        return list(tensors)
    index = torch.arange(first, first + size).clamp(max=len(tensors[0]) - 1)
    return [tensor[index] for tensor in tensors]


def joined(parts: List[Any], examples: int) -> Any:
    """Put outputs of calls together, without what was only padding."""
    flat = [torch.utils._pytree.tree_flatten(part) for part in parts]
    whole = [_concatenated(leaves)[:examples] for leaves in zip(*(leaves for leaves, _ in flat))]
    return torch.utils._pytree.tree_unflatten(whole, flat[0][1])


def normal(tensors: Sequence[Tensor]) -> List[Tensor]:
    """Lightning evaluates in inference mode, whose tensors no trace can use."""
    return [tensor.clone() if tensor.is_inference() else tensor for tensor in tensors]


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Float16 becomes float32: CPUs compute little in it, and losses would be coarse."""
    whole = torch.cat(list(parts))
    return whole.float() if whole.dtype == torch.float16 else whole


def examples_of(tensors: Sequence[Tensor]) -> List[Tuple[torch.Size, torch.dtype]]:
    """Return what all batches of a program share: the shape of an example, and its type."""
    return [(tensor.shape[1:], tensor.dtype) for tensor in tensors]
