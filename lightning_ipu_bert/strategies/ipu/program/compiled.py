"""A program, the batches that it was compiled for, and how other batches are made to fit."""

from __future__ import annotations

from typing import Any, List, Sequence, Tuple

import torch
from torch import Tensor

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.ipu.program import ProgramConfig
from lightning_ipu_bert.strategies.batch_trees import map_tree
from lightning_ipu_bert.strategies.ipu.program.network import BatchLayout


class CompiledProgram:
    """A program of PopTorch, and what it was compiled for."""

    def __init__(
        self, config: ProgramConfig, poplar: Any, batch_size: int, layout: BatchLayout
    ) -> None:
        """Create one; it is not compiled yet.

        Args:
            config: What was asked for.
            poplar: PopTorch's executor.
            batch_size: Examples of a call.
            layout: Of its batches.
        """
        self.config = config
        self.poplar = poplar
        self.batch_size = batch_size
        self.layout = layout
        self.shapes: List[Tuple[torch.Size, torch.dtype]] = []

    def attach(self) -> bool:
        """Take the IPUs; return whether it had none. The weights come with it."""
        fresh = not self.poplar.isAttachedToDevice()
        if fresh:
            self.poplar.attachToDevice()
        return bool(fresh)

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
                "Let all loaders of a run give batches of one structure."
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


def normal(tensors: Sequence[Tensor]) -> List[Tensor]:
    """Return tensors that a trace can use; Lightning evaluates in inference mode."""
    return [tensor.clone() if tensor.is_inference() else tensor for tensor in tensors]


def as_float32(output: Any) -> Any:
    """Return an output with float32 for float16: CPUs compute little in it, losses get coarse."""
    return map_tree(
        output,
        lambda x: x.float() if isinstance(x, Tensor) and x.dtype == torch.float16 else x,
    )


def examples_of(tensors: Sequence[Tensor]) -> List[Tuple[torch.Size, torch.dtype]]:
    """Return what all batches of a program share: the shape of an example, and its type."""
    return [(tensor.shape[1:], tensor.dtype) for tensor in tensors]
