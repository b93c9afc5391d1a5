"""A compiled program, and how batches are checked and padded for it."""

from __future__ import annotations

from typing import Any, List, Sequence, Tuple

import torch
from torch import Tensor

from lightning_ipu_bert.batch_trees import map_tree
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.ipu.program import ProgramConfig
from lightning_ipu_bert.strategies.ipu.program.changes import Constants, modes_of
from lightning_ipu_bert.strategies.ipu.program.network import BatchLayout
from lightning_ipu_bert.strategies.pipelined import PipelinedModule


class CompiledProgram:
    """A program of PopTorch, with the structure and size of its batches."""

    def __init__(
        self,
        config: ProgramConfig,
        poplar: Any,
        batch_size: int,
        layout: BatchLayout,
        module: PipelinedModule,
    ) -> None:
        """Create a program that is not compiled yet.

        Args:
            config: Configuration of the program.
            poplar: The executor of PopTorch.
            batch_size: Examples per call.
            layout: Layout of its batches.
            module: The LightningModule.
        """
        self.constants = Constants(module)
        self.modes = modes_of(module)
        self.config = config
        self.poplar = poplar
        self.batch_size = batch_size
        self.layout = layout
        self.shapes: List[Tuple[torch.Size, torch.dtype]] = []
        self.scalars: List[bool] = []
        """Whether each tensor of the output is a scalar."""
        self.returns_output = not config.training
        """Whether a call returns the output of the last block."""

    def attach(self) -> bool:
        """Attach to IPUs, which copies the weights; return whether it was detached before."""
        fresh = not self.poplar.isAttachedToDevice()
        if fresh:
            self.poplar.attachToDevice()
        return bool(fresh)

    def detach(self) -> None:
        """Copy weights, optimizer state and random state to the host, and detach from IPUs."""
        if self.poplar.isCompiled() and self.poplar.isAttachedToDevice():
            self.poplar.detachFromDevice()

    def check(self, batch: object, tensors: Sequence[Tensor]) -> None:
        """Check the structure and shapes of a batch, and the constants of the program.

        Raises:
            UserError: If they differ from those that the program was compiled for, or something
                else has changed that it cannot see.
        """
        self.constants.check()
        if BatchLayout.of(batch) != self.layout:
            raise UserError(
                "A batch has other entries than the first one, for which the program was compiled. "
                "All loaders of a run must return batches of the same structure."
            )
        for found, expected in zip(examples_of(tensors), self.shapes):
            if found != expected:
                raise UserError(
                    f"A batch has examples of shape {list(found[0])} ({found[1]}), but the program "
                    f"was compiled for {list(expected[0])} ({expected[1]}). Pad all examples to "
                    "the same length."
                )


def joined_scalars(output: object, scalars: Sequence[bool], micro_batches: int) -> object:
    """Return the output of a call in which scalars are means over its micro-batches.

    Args:
        output: The output; IPUs return a scalar once per micro-batch.
        scalars: Whether each of its tensors is a scalar.
        micro_batches: The micro-batches that are not only padding.
    """
    are_scalars = iter(scalars)

    def leaf(value: object) -> object:
        if isinstance(value, Tensor) and next(are_scalars):
            return value.reshape(-1)[:micro_batches].float().mean()
        return value

    return map_tree(output, leaf)


def padded(tensors: Sequence[Tensor], first: int, size: int) -> List[Tensor]:
    """Return `size` examples starting at `first`, padded by repeating the last one."""
    if not first and len(tensors[0]) == size:
        return list(tensors)
    index = torch.arange(first, first + size).clamp(max=len(tensors[0]) - 1)
    return [tensor[index] for tensor in tensors]


def normal(tensors: Sequence[Tensor]) -> List[Tensor]:
    """Return tensors that can be traced; Lightning evaluates in inference mode."""
    return [tensor.clone() if tensor.is_inference() else tensor for tensor in tensors]


def as_float32(output: object) -> object:
    """Convert float16 tensors of an output to float32, in which CPUs compute losses precisely."""
    return map_tree(
        output,
        lambda x: x.float() if isinstance(x, Tensor) and x.dtype == torch.float16 else x,
    )


def examples_of(tensors: Sequence[Tensor]) -> List[Tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of an example, which are equal in all batches of a program."""
    return [(tensor.shape[1:], tensor.dtype) for tensor in tensors]
