"""All-gather of Python objects."""

from __future__ import annotations

from typing import Any, List

import torch.distributed


def all_gather_objects(value: Any) -> List[Any]:
    """Return the values of all processes, in the order of ranks; [value] in a single process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: List[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
