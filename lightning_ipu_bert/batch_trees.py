"""Batches and outputs: nested mappings, dataclasses, tuples and lists of tensors."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import (
    Any,
    Callable,
    Dict,
    Hashable,
    List,
    Mapping,
    MutableMapping,
    Optional,
    Tuple,
    TypeVar,
    Union,
)

import numpy as np
import numpy.typing as npt
from torch import Tensor
from typing_extensions import TypeGuard

T = TypeVar("T")
Leaf = Callable[[object], object]
Path = Tuple[object, ...]
"""Keys and indices that lead to an entry of a structure."""
Rows = Union[Tensor, "npt.NDArray[np.generic]"]
"""What is split along its first dimension."""


def is_record(value: object) -> bool:
    """Return whether a value has named entries: a mapping, dataclass or named tuple."""
    named = isinstance(value, tuple) and hasattr(value, "_fields")  # as in the standard library
    return isinstance(value, Mapping) or _is_dataclass(value) or named


def entries_of(value: Any) -> Optional[Dict[object, object]]:
    """Return the entries of a container by key, name or index; None for a leaf."""
    if isinstance(value, Mapping):
        return dict(value.items())
    if _is_dataclass(value):
        return {field.name: attrgetter(field.name)(value) for field in fields(value)}
    return dict(enumerate(value)) if isinstance(value, (tuple, list)) else None


def with_entries(value: Any, entries: Mapping[Any, object]) -> object:
    """Return a container of the same type with other entries, by the keys of `entries_of`."""
    if isinstance(value, Mapping):
        return _like(value, entries)
    if _is_dataclass(value):
        result = copy.copy(value)
        for name, entry in entries.items():
            object.__setattr__(result, name, entry)  # the dataclass may be frozen
        return result
    if isinstance(value, list):
        return list(entries.values())
    return type(value)(*entries.values()) if is_record(value) else tuple(entries.values())


def map_tree(
    value: object,
    function: Leaf,
    is_leaf: Optional[Callable[[object], bool]] = None,
    sort_keys: bool = False,
) -> object:
    """Apply a function to every leaf of a structure.

    Args:
        value: Mappings, dataclasses, tuples, named tuples and lists, whose types are preserved;
            everything else is a leaf.
        function: Returns the replacement of a leaf.
        is_leaf: Returns whether a container is treated as a leaf.
        sort_keys: Visit mappings in the order of their keys and return plain dictionaries, so that
            the order of leaves does not depend on how a loader built the batch.
    """

    def walk(item: object) -> object:
        if is_leaf is not None and is_leaf(item):
            return function(item)
        entries = entries_of(item)
        if entries is None:
            return function(item)
        if sort_keys and isinstance(item, Mapping):
            return {key: walk(entries[key]) for key in sorted(entries, key=str)}
        return with_entries(item, {key: walk(entry) for key, entry in entries.items()})

    return walk(value)


def _is_dataclass(value: object) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


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
    entries = entries_of(value)
    if entries is None:
        return [value]
    return [leaf for entry in entries.values() for leaf in leaves_of(entry)]


def paths_of(value: object, path: Path = ()) -> Dict[Path, object]:
    """Return the leaves of a structure by the keys and indices that lead to them."""
    entries = entries_of(value)
    if entries is None:
        return {path: value}
    return {
        k: v for key, entry in entries.items() for k, v in paths_of(entry, (*path, key)).items()
    }


def with_leaves(value: T, leaves: Mapping[Path, object], path: Path = ()) -> T:
    """Return a structure in which some leaves are replaced, given by their paths."""
    entries = entries_of(value)
    if entries is None:
        return leaves.get(path, value)  # type: ignore[return-value]
    changed = {key: with_leaves(entry, leaves, (*path, key)) for key, entry in entries.items()}
    return with_entries(value, changed)  # type: ignore[return-value]


def tensors_of(value: object) -> List[Tensor]:
    """Return the tensors of a structure, in order."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def has_rows(value: object) -> TypeGuard[Rows]:
    """Return whether a value is a tensor or array with a first dimension."""
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0


def shape_key(batch: object) -> Hashable:
    """Return a key that is equal for batches whose stages exchange tensors of the same shapes."""
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_of(batch))
