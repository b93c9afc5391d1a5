"""Internals of Hugging Face datasets.

- `IterableDataset._distributed` (iterable_dataset.py): rank and world size of
  `split_dataset_by_node`; there is no public access.
"""

from __future__ import annotations

import sys
from typing import Any, Optional, Tuple


def share_of(dataset: object) -> Optional[Tuple[int, int]]:
    """Return rank and world size by which a streamed dataset was divided, or None."""
    datasets: Any = sys.modules.get("datasets")  # not imported here: without it there are none
    if datasets is None or not isinstance(dataset, datasets.IterableDataset):
        return None
    config: Any = vars(dataset).get("_distributed")
    return None if config is None else (config.rank, config.world_size)
