"""Batches of any structure, cut into micro-batches."""

from __future__ import annotations

from typing import Any, Hashable, Iterator, List, Mapping

from torch import Tensor

from lightning_ipu_bert.errors import UserError


def count_examples(batch: Any) -> int:
    """Return the first dimension of the first tensor in a batch.

    Raises:
        UserError: If there is no tensor with a dimension.
    """
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise UserError(
        f"A batch of type {type(batch).__name__} holds no tensor: its examples cannot be counted "
        "and parted into micro-batches. Let the loader give tensors, or nested structures of them."
    )


def split_batch(batch: Any, examples: int, size: int) -> List[Any]:
    """Cut a batch into micro-batches of `size` examples.

    Tensors whose first dimension counts the examples and lists of that many values are cut; all
    else goes into every micro-batch.
    """
    return [_part(batch, examples, first, first + size) for first in range(0, examples, size)]


def shape_key(batch: Any) -> Hashable:
    """Return what two batches must share so that stages exchange tensors of the same shape."""
    tensors = (leaf for leaf in _leaves(batch) if isinstance(leaf, Tensor))
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)


def _part(value: Any, examples: int, first: int, behind: int) -> Any:
    if isinstance(value, Tensor):
        return value[first:behind] if value.dim() and len(value) == examples else value
    if isinstance(value, Mapping):
        return {key: _part(item, examples, first, behind) for key, item in value.items()}
    if isinstance(value, tuple):
        parts = [_part(item, examples, first, behind) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        if len(value) == examples and not any(isinstance(item, Tensor) for item in value):
            return value[first:behind]
        return [_part(item, examples, first, behind) for item in value]
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
