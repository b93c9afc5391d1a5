"""All-gather of Python objects."""

from __future__ import annotations

from typing import List, Optional, TypeVar

import torch.distributed
from torch.distributed import ProcessGroup

T = TypeVar("T")


def all_gather_objects(value: T, group: Optional[ProcessGroup] = None) -> List[T]:
    """Return the values of the processes of a group, in the order of ranks.

    Args:
        value: The value of this process; returned alone in a single process.
        group: A process group, e.g. `StrategyFacts.data_group`; None for all processes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values = [value] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values
