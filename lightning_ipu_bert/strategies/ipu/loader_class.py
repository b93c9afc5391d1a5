"""`poptorch.DataLoader` with what Lightning needs of a loader."""

from __future__ import annotations

import random
from functools import lru_cache, partial
from itertools import chain
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler
from typing_extensions import override

from lightning_ipu_bert.strategies.batch_trees import map_tree
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


class FlattenedBatchSampler(Sampler):  # type: ignore[type-arg]  # not generic in torch 2.0
    """The examples of a batch sampler's batches, one after the other."""

    def __init__(self, batches: Iterable[Sequence[int]], batch_size: int) -> None:
        """Create a sampler.

        Args:
            batches: A user's batch sampler.
            batch_size: Examples of each of its batches.
        """
        self.batches = batches
        self.batch_size = batch_size

    @override
    def __iter__(self) -> Iterator[int]:
        """Draw an epoch."""
        return chain.from_iterable(self.batches)

    def __len__(self) -> int:
        """Return the number of examples, as if the last batch were full."""
        return len(self.batches) * self.batch_size  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on, which Lightning gives to samplers that want it."""
        parts: List[Any] = [self.batches, getattr(self.batches, "sampler", None)]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)


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
            loader = poptorch.DataLoader(**self._for_another_process())
            try:
                for batch in loader:
                    # The memory is shared and used again, but Lightning holds a batch while it
                    # fetches the next.
                    yield map_tree(batch, _copy)
            finally:
                loader.terminate()

        def _for_another_process(self) -> Dict[str, Any]:
            """Draw order and seed here: generators do not travel, and that process has no seed."""
            arguments = {**self._arguments, **self._rebatching()}
            seed = torch.empty((), dtype=torch.int64).random_(generator=arguments.pop("generator"))
            begin = partial(_begin_worker, int(seed), self.worker_init_fn)
            arguments["worker_init_fn"] = begin
            if not isinstance(self.dataset, IterableDataset):
                arguments["sampler"] = list(chain.from_iterable(self.batch_sampler))
            return arguments

        def _rebatching(self) -> Dict[str, int]:
            """Workers make parts of a batch, about two each, as in optimum-graphcore."""
            workers, mode = self._arguments["num_workers"], self._arguments["mode"]
            if mode != poptorch.DataLoaderMode.AsyncRebatched or not workers:
                return {}
            whole = self.combinedBatchSize
            return {"rebatched_worker_size": max(1, min(whole, 2 * whole // workers))}

    bases = (AnyMode,) if kind is DataLoader else (kind, AnyMode)
    return type("IPUDataLoader", bases, {})


def _begin_worker(seed: int, then: Optional[Callable[[int], None]], worker: int) -> None:
    """Seed a worker as torch does, and run the user's own function behind it."""
    torch.manual_seed(seed + worker)
    random.seed(seed + worker)
    if then is not None:
        then(worker)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
