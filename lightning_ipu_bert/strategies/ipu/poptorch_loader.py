"""`poptorch.DataLoader` with Lightning's needs. Imported only where PopTorch is there."""

from __future__ import annotations

from typing import Any, Dict, Iterator

import poptorch  # type: ignore[import-not-found]
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ipu_bert.data.loaders import ResumableDataLoader

KEPT = (
    "collate_fn",
    "generator",
    "multiprocessing_context",
    "num_workers",
    "prefetch_factor",
    "timeout",
    "worker_init_fn",
)
"""What is taken over from a user's loader as it is."""


class _PerEpoch(poptorch.DataLoader):  # type: ignore[misc]
    """Loads ahead in a process that is started anew for each epoch.

    PopTorch's own keeps its process, with the copy of the sampler that it was started with: every
    epoch would have the order of the first, and a resumed one would not know where to go on.
    """

    def __init__(self, *, mode: Any, **arguments: Any) -> None:
        self._arguments: Dict[str, Any] = {**arguments, "mode": mode}
        self._ahead = mode != poptorch.DataLoaderMode.Sync
        super().__init__(**arguments)

    def __iter__(self) -> Iterator[Any]:
        if not self._ahead:
            yield from super().__iter__()
            return
        loader = poptorch.DataLoader(**self._arguments, **self._rebatching())
        try:
            for batch in loader:
                # The memory is shared and used again, but Lightning holds a batch while it fetches
                # the next.
                yield torch.utils._pytree.tree_map(_copy, batch)
        finally:
            loader.terminate()

    def _rebatching(self) -> Dict[str, int]:
        """Workers make parts of a batch, about two each, as in optimum-graphcore."""
        workers = self._arguments["num_workers"]
        if self._arguments["mode"] != poptorch.DataLoaderMode.AsyncRebatched or not workers:
            return {}
        whole = self.combinedBatchSize
        return {"rebatched_worker_size": max(1, min(whole, 2 * whole // workers))}


class IPUDataLoader(ResumableDataLoader, _PerEpoch):
    """Batches of a whole call; training can go on in the middle of an epoch."""

    @classmethod
    def like(cls, loader: DataLoader[Any], **arguments: Any) -> IPUDataLoader:
        """Return a loader of the same examples.

        Args:
            loader: The user's.
            **arguments: What is different: see `poptorch.DataLoader`.
        """
        kept = {name: getattr(loader, name) for name in KEPT}
        if not kept["num_workers"]:
            del kept["prefetch_factor"]  # torch refuses it without workers
        result = cls(dataset=loader.dataset, **kept, **arguments)
        result._resume_from = getattr(loader, "_resume_from", None)
        return result


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
