"""All-gather of Python objects."""

from __future__ import annotations

from typing import List, TypeVar

import torch.distributed

T = TypeVar("T")


def all_gather_objects(value: T) -> List[T]:
    """Return the values of all processes, in the order of ranks; [value] in a single process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
