"""Batches and outputs of any structure: nested mappings, tuples and lists of tensors."""

from __future__ import annotations

import copy
from typing import Any, Callable, Hashable, List, Mapping, MutableMapping, Optional, Sequence, Union

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import TypeGuard

from lightning_ipu_bert.errors import UserError

Leaf = Callable[[object], object]
Rows = Union[Tensor, "npt.NDArray[np.generic]"]
"""What is split along its first dimension."""


def map_tree(
    value: object,
    function: Leaf,
    is_leaf: Optional[Callable[[object], bool]] = None,
    sort_keys: bool = False,
) -> object:
    """Apply a function to every leaf of a structure.

    Args:
        value: Mappings (whose type is preserved), tuples, named tuples and lists; everything else
            is a leaf.
        function: Returns the replacement of a leaf.
        is_leaf: Returns whether a container is treated as a leaf.
        sort_keys: Visit mappings in the order of their keys and return plain dictionaries, so that
            the order of leaves does not depend on how a loader built the batch.
    """

    def walk(item: object) -> Any:
        if is_leaf is not None and is_leaf(item):
            return function(item)
        if isinstance(item, Mapping):
            if sort_keys:
                return {key: walk(item[key]) for key in sorted(item, key=str)}
            return _like(item, {key: walk(entry) for key, entry in item.items()})
        if isinstance(item, tuple):
            parts = [walk(entry) for entry in item]
            named = hasattr(item, "_fields")  # as in the standard library
            return type(item)(*parts) if named else tuple(parts)
        if isinstance(item, list):
            return [walk(entry) for entry in item]
        return function(item)

    return walk(value)


def _like(mapping: Mapping[object, object], items: Mapping[object, object]) -> object:
    """Return `items` as a mapping of the same type."""
    if type(mapping) is dict or not isinstance(mapping, MutableMapping):
        return items
    result = copy.copy(mapping)
    for key, item in items.items():
        result[key] = item
    return result


def leaves_of(value: object) -> List[object]:
    """Return the leaves of a structure, in order."""
    found: List[object] = []
    map_tree(value, found.append)
    return found


def tensors_of(value: object) -> List[Tensor]:
    """Return the tensors of a structure, in order."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def has_rows(value: object) -> TypeGuard[Rows]:
    """Return whether a value is a tensor or array with a first dimension."""
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0


def count_examples(batch: object) -> int:
    """Return the first dimension of the first tensor in a batch; of an array if there is none.

    Raises:
        UserError: If there is no tensor or array with a dimension.
    """
    arrays = [leaf for leaf in leaves_of(batch) if has_rows(leaf)]
    for rows in [*(x for x in arrays if isinstance(x, Tensor)), *arrays]:
        return len(rows)
    raise UserError(
        f"A batch of type {type(batch).__name__} has no tensor, so its examples cannot be counted "
        "and split into micro-batches. The loader must return tensors or structures of tensors."
    )


def split_batch(batch: object, examples: int, size: int) -> List[object]:
    """Split a batch into micro-batches of `size` examples; a smaller remainder is left out.

    Tensors and arrays with `examples` rows are split, and lists and tuples with an entry for every
    example. Everything else is in every micro-batch.
    """

    def has_entries(value: object) -> TypeGuard[Sequence[object]]:
        """Return whether a list or tuple has an entry for every example, and is no structure."""
        if not isinstance(value, (list, tuple)) or len(value) != examples:
            return False
        if all(isinstance(entry, Mapping) for entry in value):
            return True
        return not any(has_rows(leaf) and len(leaf) == examples for leaf in leaves_of(value))

    def part(first: int) -> object:
        rows = slice(first, first + size)

        def cut(value: object) -> object:
            if has_rows(value):
                return value[rows] if len(value) == examples else value
            return value[rows] if has_entries(value) else value

        return map_tree(batch, cut, has_entries)

    return [part(first) for first in range(0, examples - size + 1, size)]


def shape_key(batch: object) -> Hashable:
    """Return a key that is equal for batches whose stages exchange tensors of the same shapes."""
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_of(batch))


def join_outputs(parts: Sequence[object], examples: Optional[int] = None) -> object:
    """Concatenate the outputs of micro-batches along the examples; scalars are averaged.

    Args:
        parts: Outputs of the same structure.
        examples: Number of examples to keep if the last part was padded; None keeps all.
    """
    joined = iter([_join(leaves, examples) for leaves in zip(*map(tensors_of, parts))])
    return map_tree(parts[0], lambda leaf: next(joined) if isinstance(leaf, Tensor) else leaf)


def _join(parts: Sequence[Tensor], examples: Optional[int]) -> Tensor:
    if not parts[0].dim():
        return torch.stack(list(parts)).mean()
    return torch.cat(list(parts))[:examples]
