"""Loaders of whole calls."""

import pickle

import torch

from poptorch.device import Error
from poptorch.enums import DataLoaderMode
from poptorch.options import Options


class DataLoader(torch.utils.data.DataLoader):
    def __init__(
        self,
        options,
        dataset,
        batch_size=1,
        shuffle=None,
        num_workers=0,
        drop_last=True,
        persistent_workers=None,
        auto_distributed_partitioning=True,
        mode=DataLoaderMode.Sync,
        async_options=None,
        rebatched_worker_size=None,
        batch_sampler=None,
        **kwargs,
    ):
        assert isinstance(options, Options)
        options._freeze()
        self._is_user_batch_sampler_set = batch_sampler is not None
        if self._is_user_batch_sampler_set:
            if batch_size != 1 or shuffle:
                raise Error(
                    "`batch_sampler` option is mutually exclusive with batch_size, shuffle."
                )
            batch_size = getattr(batch_sampler, "batch_size", batch_size)
            self.batch_sampler_drop_last, drop_last = drop_last, None
        else:
            shuffle = bool(shuffle)
        combine = options.device_iterations * options.replication_factor
        self._num_batches_to_combine = combine * options.Training.gradient_accumulation
        self._combined_batch_size = batch_size * self._num_batches_to_combine
        self._options = options
        self._accessor, self._mode = None, mode
        if rebatched_worker_size is not None:
            assert rebatched_worker_size <= self._combined_batch_size
            if self._is_user_batch_sampler_set:
                raise ValueError("batch_sampler option is mutually exclusive with batch_size")
        if isinstance(dataset, torch.utils.data.IterableDataset):
            shuffle = None
        elif num_workers == 0 and len(dataset) < self._combined_batch_size and drop_last:
            assert mode != DataLoaderMode.Async, "The Dataset is empty"
        if persistent_workers is None:
            persistent_workers = num_workers > 0
        super().__init__(
            dataset,
            batch_size=1 if self._is_user_batch_sampler_set else self._combined_batch_size,
            shuffle=shuffle,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            drop_last=drop_last,
            persistent_workers=persistent_workers,
            **kwargs,
        )
        if mode != DataLoaderMode.Sync:
            self._accessor = AsynchronousDataAccessor(self)

    @property
    def combinedBatchSize(self):
        return self._combined_batch_size

    @property
    def options(self):
        return self._options

    def terminate(self):
        if self._accessor is not None:
            self._accessor.terminate()

    def __iter__(self):
        if self._accessor is not None:
            return iter(self._accessor)
        return self._whole_calls()

    def _whole_calls(self):
        batches = super().__iter__()
        if not self._is_user_batch_sampler_set or self._num_batches_to_combine == 1:
            return batches
        return self._combined(batches)

    def _combined(self, batches):
        waiting = []
        for batch in batches:
            waiting.append(batch)
            if len(waiting) == self._num_batches_to_combine:
                yield _together(waiting)
                waiting = []
        if waiting and not self.batch_sampler_drop_last:
            yield _together(waiting)


class AsynchronousDataAccessor:
    """Keeps the copy of the loader that it began with, and gives memory that it uses again."""

    def __init__(
        self,
        dataset,
        buffer_size=3,
        miss_sleep_time_in_ms=0.1,
        load_indefinitely=True,
        early_preload=False,
        sharing_strategy=None,
        rebatched_size=None,
    ):
        if dataset.generator is not None:  # torch 2.0 says so, newer ones would do it
            raise TypeError("cannot pickle 'torch._C.Generator' object")
        # A process of its own has the loader as it was when the process began.
        self._loader = pickle.loads(pickle.dumps(dataset))
        self._buffer, self._alive = None, True

    def terminate(self):
        self._alive = False

    def __iter__(self):
        assert self._alive
        with torch.random.fork_rng(devices=[]):
            torch.seed()  # that process has random numbers of its own
            batches = iter(self._loader._whole_calls())
        for batch in batches:
            yield self._shared(batch)

    def _shared(self, batch):
        leaves, structure = torch.utils._pytree.tree_flatten(batch)
        if self._buffer is None or len(leaves[0]) != len(self._buffer[0]):
            self._buffer = [leaf.clone() for leaf in leaves]
        for mine, leaf in zip(self._buffer, leaves):
            mine.copy_(leaf)
        return torch.utils._pytree.tree_unflatten(self._buffer, structure)


def _together(batches):
    flat = [torch.utils._pytree.tree_flatten(batch) for batch in batches]
    leaves = [torch.cat(parts) for parts in zip(*(leaves for leaves, _ in flat))]
    return torch.utils._pytree.tree_unflatten(leaves, flat[0][1])
