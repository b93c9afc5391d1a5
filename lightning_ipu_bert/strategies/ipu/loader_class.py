"""`poptorch.DataLoader` with the features of a loader that Lightning requires."""

from __future__ import annotations

import random
from functools import lru_cache, partial
from itertools import chain
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler
from typing_extensions import override

from lightning_ipu_bert.batch_trees import map_tree
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
"""Arguments that are copied from the loader of the user."""


class FlattenedBatchSampler(Sampler):  # type: ignore[type-arg]  # not generic in torch 2.0
    """The indices of the batches of a batch sampler, concatenated."""

    def __init__(self, batches: Iterable[Sequence[int]], batch_size: int) -> None:
        """Create a sampler.

        Args:
            batches: A batch sampler.
            batch_size: Number of examples of each batch.
        """
        self.batches = batches
        self.batch_size = batch_size

    @override
    def __iter__(self) -> Iterator[int]:
        """Yield the indices of an epoch."""
        return chain.from_iterable(self.batches)

    def __len__(self) -> int:
        """Return the number of examples, assuming a complete last batch."""
        return len(self.batches) * self.batch_size  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the batch sampler and its sampler, as Lightning does."""
        parts: List[object] = [self.batches, getattr(self.batches, "sampler", None)]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)


def loader_like(loader: DataLoader[object], **arguments: object) -> Any:
    """Return a `poptorch.DataLoader` of the same examples.

    A stateful loader, which can resume in the middle of an epoch, remains stateful: the class of
    the new loader is also derived from its class.

    Args:
        loader: The loader of the user.
        **arguments: Arguments of `poptorch.DataLoader`.
    """
    kept = {name: getattr(loader, name) for name in KEPT}
    if not kept["num_workers"]:
        del kept["prefetch_factor"]  # torch rejects it without workers
    kind: object = type(loader)
    resumes = hasattr(loader, "load_state_dict") and "__init__" not in vars(kind)
    result = _loader_class(kind if resumes else DataLoader)(
        dataset=loader.dataset, auto_distributed_partitioning=False, **kept, **arguments
    )
    for name, value in vars(loader).items():
        if name not in vars(result):
            setattr(result, name, value)  # such as the position to resume from
    return result


@lru_cache(maxsize=None)
def _loader_class(kind: Any) -> Any:
    poptorch = import_poptorch()

    class AnyMode(poptorch.DataLoader):  # type: ignore[misc, name-defined]
        """Prefetches in a process that is started for each epoch.

        PopTorch's own loader keeps its process with the initial copy of the sampler: every epoch
        would have the order of the first, and none could be resumed in the middle.
        """

        def __init__(self, *, mode: object, **arguments: object) -> None:
            self._arguments: Dict[str, Any] = {**arguments, "mode": mode}
            self._prefetches = mode != poptorch.DataLoaderMode.Sync
            super().__init__(**arguments)

        def __iter__(self) -> Iterator[object]:
            if not self._prefetches:
                yield from super().__iter__()
                return
            loader = poptorch.DataLoader(**self._arguments_of_process())
            try:
                for batch in loader:
                    # The shared memory is reused, but Lightning keeps a batch while it fetches the
                    # next one.
                    yield map_tree(batch, _copy)
            finally:
                loader.terminate()

        def _arguments_of_process(self) -> Dict[str, object]:
            """Return arguments with order and seed: generators cannot be sent to a process."""
            arguments = {**self._arguments, **self._rebatching()}
            seed = torch.empty((), dtype=torch.int64).random_(generator=arguments.pop("generator"))
            begin = partial(_begin_worker, int(seed), self.worker_init_fn)
            arguments["worker_init_fn"] = begin
            if not isinstance(self.dataset, IterableDataset):
                arguments["sampler"] = list(chain.from_iterable(self.batch_sampler))
            return arguments

        def _rebatching(self) -> Dict[str, int]:
            """Let workers create parts of a batch, about two each, as in optimum-graphcore."""
            workers, mode = self._arguments["num_workers"], self._arguments["mode"]
            if mode != poptorch.DataLoaderMode.AsyncRebatched or not workers:
                return {}
            size = self.combinedBatchSize
            return {"rebatched_worker_size": max(1, min(size, 2 * size // workers))}

    bases = (AnyMode,) if kind is DataLoader else (kind, AnyMode)
    return type("IPUDataLoader", bases, {})


def _begin_worker(seed: int, then: Optional[Callable[[int], None]], worker: int) -> None:
    """Seed a worker as torch does, then call the function of the user."""
    torch.manual_seed(seed + worker)
    random.seed(seed + worker)
    if then is not None:
        then(worker)


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value
