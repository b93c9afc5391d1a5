"""The hidden states between two stages: any structure, sent as contiguous tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Mapping, Sequence, Tuple

import torch
from torch import Tensor

from lightning_ipu_bert.batch_trees import Path, leaves_of, map_tree, paths_of, tensors_of
from lightning_ipu_bert.errors import UserError


def shapes_of(value: object) -> object:
    """Replace the tensors of a structure by meta tensors of the same shape and dtype."""
    return map_tree(value, lambda x: _meta(x) if isinstance(x, Tensor) else x)


def _meta(tensor: Tensor) -> Tensor:
    meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return meta.requires_grad_(tensor.requires_grad)


def zeros_like(shapes: object, device: torch.device) -> object:
    """Replace the meta tensors of a structure by tensors of zeros."""
    return map_tree(shapes, lambda x: zeros_of(x, device) if isinstance(x, Tensor) else x)


def zeros_of(shape: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of zeros with the properties of a meta tensor."""
    return torch.zeros_like(shape, device=device, requires_grad=shape.requires_grad)


PLAIN = (type(None), bool, int, float, str)
"""Values besides tensors that hidden states may contain."""
NOTHING = torch.empty(1, device="meta")
"""What is sent in place of hidden states without a tensor."""


@dataclass(frozen=True)
class HiddenStates:
    """Structure and shapes of what a stage receives for every micro-batch."""

    structure: object = None
    """The output of the previous stage, with meta tensors."""
    is_input: bool = False
    """Whether there is no previous stage."""

    @classmethod
    def of(cls, value: object, stage: int) -> HiddenStates:
        """Return the structure of the output of a stage.

        Args:
            value: The output.
            stage: The stage, for the message.

        Raises:
            UserError: If it contains something else than tensors and plain values.
        """
        for leaf in leaves_of(value):
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise UserError(
                    f"stage_forward of stage {stage} returns an object of type "
                    f"{type(leaf).__name__}, which cannot be sent to the next stage. Return "
                    "tensors, plain values and None, in dictionaries, lists, tuples or dataclasses."
                )
        return cls(shapes_of(value))

    @property
    def shapes(self) -> List[Tensor]:
        """The tensors that are received, as meta tensors."""
        return [] if self.is_input else tensors_of(self.structure) or [NOTHING]

    def zeros(self, device: torch.device) -> Tuple[Tensor, ...]:
        """Return tensors of these shapes."""
        return tuple(zeros_of(shape, device) for shape in self.shapes)

    def pack(self, value: object, stage: int, device: torch.device) -> Tuple[Tensor, ...]:
        """Return the tensors of the output of a stage, contiguous.

        Args:
            value: The output for a micro-batch.
            stage: The stage, for the message.
            device: Device of this rank.

        Raises:
            UserError: If the next stage expects something else.
        """
        found, expected = paths_of(value), paths_of(self.structure)
        for path in {**expected, **found}:
            a, b = (_described(leaves, path) for leaves in (found, expected))
            if a != b:
                raise UserError(
                    f"stage_forward of stage {stage} returns hidden states{_entry(path)} with {a} "
                    f"for this micro-batch, but {b} for the first one of its shape. Only the "
                    "values of tensors may depend on the values of a batch."
                )
        sent = [found[path] for path in expected]  # mappings may be in another order
        tensors = [tensor.contiguous() for tensor in sent if isinstance(tensor, Tensor)]
        return tuple(tensors or [zeros_of(NOTHING, device)])

    def unpack(self, tensors: Sequence[Tensor]) -> object:
        """Return the hidden states from the tensors that were received."""
        given = iter(tensors)
        return map_tree(
            self.structure,
            lambda x: received(next(given)) if isinstance(x, Tensor) else x,
        )


def received(tensor: Tensor) -> Tensor:
    """Return a hidden state that a stage may modify in place, and whose gradient is contiguous."""
    if not tensor.requires_grad:
        return tensor
    result = tensor.clone()
    result.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call]
    return result


def _described(leaves: Mapping[Path, object], path: Path) -> str:
    """Return what must be equal for all micro-batches."""
    if path not in leaves:
        return "no such entry"
    leaf = leaves[path]
    if isinstance(leaf, Tensor):
        return f"a tensor of shape {list(leaf.shape)} ({leaf.dtype})"
    return repr(leaf)


def _entry(path: Path) -> str:
    return "".join(f"[{key!r}]" for key in path)
