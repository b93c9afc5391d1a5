"""The examples of a batch: how many there are, how they are split and put together again."""

from __future__ import annotations

from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from typing_extensions import TypeGuard

from lightning_ipu_bert.batch_trees import (
    Path,
    entries_of,
    has_rows,
    is_record,
    leaves_of,
    map_tree,
    tensors_of,
    with_entries,
)
from lightning_ipu_bert.errors import UserError

EntryMemo = Dict[Path, bool]
"""Whether a list has one entry for every example, by its path, where an earlier batch has shown."""


def count_examples(batch: object, memo: Optional[EntryMemo] = None) -> int:
    """Return the number of examples in a batch.

    It is the first dimension of a tensor that is the batch or one of its named entries; otherwise
    the length of a list whose entries are examples: of dictionaries or tensors that have no first
    dimension in common; otherwise the first dimension of any tensor, or of an array.

    Args:
        batch: The batch.
        memo: See `split_batch`.

    Raises:
        UserError: If there is no tensor or array with a dimension.
    """
    arrays = [leaf for leaf in leaves_of(batch) if has_rows(leaf)]
    named = [value for value in _named_values(batch) if isinstance(value, Tensor) and value.dim()]
    known = memo or {}
    lists = [
        values for path, values in _lists_in(batch) if known.get(path) or _lists_examples(values)
    ]
    for counted in (*named, *lists, *(x for x in arrays if isinstance(x, Tensor)), *arrays):
        return len(counted)
    raise UserError(
        f"A batch of type {type(batch).__name__} has no tensor, so its examples cannot be counted "
        "and split into micro-batches. The loader must return tensors or structures of tensors."
    )


def split_batch(
    batch: object, examples: int, size: int, memo: Optional[EntryMemo] = None
) -> List[object]:
    """Split a batch into micro-batches of `size` examples; a smaller remainder is left out.

    Tensors and arrays with `examples` rows are split, and lists and tuples with an entry for every
    example. Everything else is in every micro-batch.

    Args:
        batch: The batch.
        examples: The number of its examples.
        size: Examples of a micro-batch.
        memo: Passed to all calls of a run, so that a list in a batch that has, by chance, as many
            examples as the list has tensors is treated as in earlier batches.
    """
    known = {} if memo is None else memo

    def part(value: object, rows: slice, path: Path) -> object:
        if has_rows(value):
            return value[rows] if len(value) == examples else value
        if _is_list(value) and _has_entries(value, examples, path, known):
            return value[rows]
        entries = entries_of(value)
        if entries is None:
            return value
        return with_entries(value, {k: part(v, rows, (*path, k)) for k, v in entries.items()})

    starts = range(0, examples - size + 1, size)
    return [part(batch, slice(first, first + size), ()) for first in starts]


def _has_entries(values: Sequence[object], examples: int, path: Path, known: EntryMemo) -> bool:
    """Return whether a list has one entry for every example, and is not a list of columns."""
    if len(values) != examples:
        known[path] = False
    if path in known:
        return known[path]
    lengths = _lengths(values)
    if examples not in lengths:
        known[path] = True
        return True
    if set(lengths) == {examples} and (len(values) < 3 or not path):
        return False  # columns, like a pair of inputs
    return _is_homogeneous(values)


def _lists_examples(values: Sequence[object]) -> bool:
    """Return whether the entries of a list are examples and cannot be columns."""
    lengths = _lengths(values)
    if all(isinstance(value, Tensor) and not value.dim() for value in values):
        return bool(values)
    if len(values) < 2 or len(set(lengths)) == 1 or not _is_homogeneous(values):
        return False
    columns = isinstance(values, tuple) and -1 not in lengths
    return not columns or all(is_record(value) for value in values)


def _is_homogeneous(values: Sequence[object]) -> bool:
    """Return whether all entries are records, or tensors that differ in their sizes only."""
    kinds = {(v.dtype, v.dim()) if isinstance(v, Tensor) else is_record(v) for v in values}
    return len(kinds) == 1 and False not in kinds


def _lengths(values: Sequence[object]) -> List[int]:
    """Return the first dimension of every tensor and array in a list; -1 if it has none."""
    leaves = [x for x in leaves_of(values) if isinstance(x, Tensor) or has_rows(x)]
    return [len(x) if has_rows(x) else -1 for x in leaves]


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, (list, tuple)) and not is_record(value)


def _named_values(value: object) -> Iterator[object]:
    """Yield the batch, or its entries that have a name on every level."""
    if not is_record(value):
        yield value
        return
    for entry in (entries_of(value) or {}).values():
        yield from _named_values(entry)


def _lists_in(value: object, path: Path = ()) -> Iterator[Tuple[Path, Sequence[object]]]:
    """Yield the lists and tuples of a batch with their paths, outer ones first."""
    if _is_list(value):
        yield path, value
    for key, entry in (entries_of(value) or {}).items():
        yield from _lists_in(entry, (*path, key))


def example_dims(output: object, examples: int) -> Optional[List[int]]:
    """Return the dimension of the examples in each tensor of an output; None if it is ambiguous.

    Args:
        output: The output for a micro-batch.
        examples: The number of its examples.
    """
    found = []
    for tensor in tensors_of(output):
        equal = [dim for dim, length in enumerate(tensor.shape) if length == examples]
        if len(equal) > 1:
            return None
        found.append(equal[0] if equal else 0)
    return found


def changed_dims(output: object, other: object) -> List[int]:
    """Return the dimensions in which the outputs for different numbers of examples differ."""
    return [
        next((dim for dim, (a, b) in enumerate(zip(one.shape, two.shape)) if a != b), 0)
        for one, two in zip(tensors_of(output), tensors_of(other))
    ]


def join_outputs(
    parts: Sequence[object], dims: Optional[Sequence[int]] = None, examples: Optional[int] = None
) -> object:
    """Concatenate the outputs of micro-batches along the examples; scalars are averaged.

    Args:
        parts: Outputs of the same structure.
        dims: The dimension of the examples in each tensor; None for the first.
        examples: Number of examples to keep if the last part was padded; None keeps all.
    """
    columns = list(zip(*map(tensors_of, parts)))
    along = dims or [0] * len(columns)
    joined = iter([_join(leaves, dim, examples) for leaves, dim in zip(columns, along)])
    return map_tree(parts[0], lambda leaf: next(joined) if isinstance(leaf, Tensor) else leaf)


def _join(parts: Sequence[Tensor], dim: int, examples: Optional[int]) -> Tensor:
    if not parts[0].dim():
        return torch.stack(list(parts)).mean()
    return torch.cat(list(parts), dim)[:examples]
