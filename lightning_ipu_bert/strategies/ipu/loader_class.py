"""`poptorch.DataLoader` with what Lightning needs of a loader."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Dict, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch

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


def loader_like(loader: DataLoader[Any], **arguments: Any) -> Any:
    """Return a `poptorch.DataLoader` of the same examples.

    A loader that can go on in the middle of an epoch still can: the class of the new one is derived
    from its class, too.

    Args:
        loader: The user's.
        **arguments: What is different: see `poptorch.DataLoader`.
    """
    kept = {name: getattr(loader, name) for name in KEPT}
    if not kept["num_workers"]:
        del kept["prefetch_factor"]  # torch refuses it without workers
    kind: Any = type(loader)
    resumes = hasattr(loader, "load_state_dict") and "__init__" not in vars(kind)
    result = _loader_class(kind if resumes else DataLoader)(
        dataset=loader.dataset, auto_distributed_partitioning=False, **kept, **arguments
    )
    for name, value in vars(loader).items():
        if name not in vars(result):
            setattr(result, name, value)  # such as where to go on
    return result


@lru_cache(maxsize=None)
def _loader_class(kind: Any) -> Any:
    poptorch = import_poptorch()

    class AnyMode(poptorch.DataLoader):  # type: ignore[misc, name-defined]
        """Loads ahead in a process that is started anew for each epoch.

        PopTorch's own keeps its process, with the copy of the sampler that it was started with:
        every epoch would have the order of the first, and none could begin in the middle.
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
                    # The memory is shared and used again, but Lightning holds a batch while it
                    # fetches the next.
                    yield torch.utils._pytree.tree_map(_copy, batch)
            finally:
                loader.terminate()

        def __len__(self) -> int:
            if not self._is_user_batch_sampler_set:
                return int(super().__len__())
            batches, rest = divmod(len(self.batch_sampler), self._num_batches_to_combine)
            return int(batches + (1 if rest and not self.batch_sampler_drop_last else 0))

        def _rebatching(self) -> Dict[str, int]:
            """Workers make parts of a batch, about two each, as in optimum-graphcore."""
            workers, mode = self._arguments["num_workers"], self._arguments["mode"]
            if mode != poptorch.DataLoaderMode.AsyncRebatched or not workers:
                return {}
            whole = self.combinedBatchSize
            return {"rebatched_worker_size": max(1, min(whole, 2 * whole // workers))}

    bases = (AnyMode,) if kind is DataLoader else (kind, AnyMode)
    return type("IPUDataLoader", bases, {})


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
