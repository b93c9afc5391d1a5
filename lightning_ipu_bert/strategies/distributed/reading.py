"""Reading on one rank of each replica; the other stages receive its batches.

A loader's dataset, sampler, workers and collate function run on the first rank of a replica only.
The states of its random generators travel with the batches, so that a step that draws numbers
(mixup) draws the same ones on all ranks of the replica, as in a single process.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import (
    Callable,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Sized,
    Tuple,
    Type,
)

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_ipu_bert._compat.loaders import indices_drawn, iterated_by_a_loop
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.strategies.distributed import messages
from lightning_ipu_bert.strategies.distributed.lengths import all_replicas, length_in_replica
from lightning_ipu_bert.strategies.distributed.loaders import check_examples
from lightning_ipu_bert.strategies.distributed.mesh import Mesh
from lightning_ipu_bert.training.random_states import GeneratorStates, seed_generators


class Message(NamedTuple):
    """What the reading rank of a replica sends to the others."""

    generators: GeneratorStates
    """Random states after reading."""
    batch: object = None
    indices: Sequence[object] = ()
    """Indices of the batches drawn since the previous message, in `predict`."""
    is_end: bool = False


class ReplicaReader:
    """Lets the loops of a Trainer iterate over loaders on one rank of each replica."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        """Create the reader of a run.

        Args:
            mesh: Mesh coordinates and groups of this rank.
            device: Device of the collectives of replicas.
        """
        self.mesh = mesh
        self.device = device
        self.reads = mesh.pipeline_rank == 0
        """Whether this rank reads."""
        self.before_next: Optional[GeneratorStates] = None
        """States to restore before the next training batch is read: a run resumes in an epoch."""
        self._order_seed: Optional[int] = None
        self._attached: List[Tuple[object, type]] = []

    def attach(self, loader: Iterable[object], training: bool) -> Iterable[object]:
        """Return the loader, which is read by one rank of each replica.

        Its class is replaced by a derived one until `detach`, so that the object, and all that
        callbacks know of it, remains the one of the user.

        Args:
            loader: Any iterable over batches.
            training: Whether replicas must have the same number of batches.
        """
        length = length_in_replica(loader, self.mesh, self.device, training)
        if training and self.num_replicas > 1 and isinstance(loader, DataLoader):
            self._order_alike(loader.sampler)
        try:
            self._derive(loader, length, training)
        except TypeError:  # of built-in types: a list of batches, a generator
            loader = _Iterable(loader)
            self._derive(loader, length, training)
        return loader

    def detach(self) -> None:
        """Restore the classes of all loaders."""
        while self._attached:
            loader, kind = self._attached.pop()
            loader.__class__ = kind

    @property
    def num_replicas(self) -> int:
        """Number of replicas."""
        return dist.get_world_size(self.mesh.replica_group)

    def _order_alike(self, sampler: object) -> None:
        """Let a sampler that draws from the global generators draw the same on all replicas.

        Lightning divides the indices that every replica draws: in different orders, examples would
        be read twice or never.
        """
        if type(sampler) is not DistributedSamplerWrapper:
            return

        def __iter__(own: DistributedSamplerWrapper) -> Iterator[object]:  # noqa: N807
            with self._drawing_alike():
                return DistributedSamplerWrapper.__iter__(own)

        kind = type(sampler)
        sampler.__class__ = type(kind.__name__, (kind,), {"__iter__": __iter__})
        self._attached.append((sampler, kind))

    @contextmanager
    def _drawing_alike(self) -> Iterator[None]:
        """Draw the same numbers on all replicas within the context, once an epoch has begun."""
        own = GeneratorStates.current()
        if self._order_seed is not None:
            seed_generators(self._order_seed)
        try:
            yield
        finally:
            own.restore()

    def _derive(self, loader: Iterable[object], length: Optional[int], training: bool) -> None:
        kind: Type[Iterable[object]] = type(loader)

        def __iter__(own: Iterable[object]) -> Iterator[object]:  # noqa: N807
            read: Callable[[], Iterator[object]] = partial(kind.__iter__, own)
            return self._begin(own, read, training) if iterated_by_a_loop() else read()

        def __len__(own: object) -> int:  # noqa: N807
            if length is None:
                raise TypeError(f"object of type {kind.__name__!r} has no len()")
            return length

        loader.__class__ = type(kind.__name__, (kind,), {"__iter__": __iter__, "__len__": __len__})
        self._attached.append((loader, kind))

    def _begin(
        self, loader: object, read: Callable[[], Iterator[object]], training: bool
    ) -> Iterator[object]:
        """Create the iterator of an epoch, on all ranks together."""
        if not self.reads:
            self._next_message().generators.restore()
            return self._receive(indices_drawn(loader, iterated=False))
        if training and self.num_replicas > 1:
            seed = torch.tensor(GeneratorStates.current().seed("order"), device=self.device)
            dist.broadcast(
                seed, dist.get_global_rank(self.mesh.replica_group, 0), self.mesh.replica_group
            )
            self._order_seed = int(seed)
        iterator = read()
        self._send(Message(GeneratorStates.current()))
        return self._read(loader, iterator, training)

    def _read(self, loader: object, iterator: Iterator[object], training: bool) -> Iterator[object]:
        if training and self.before_next is not None:
            self.before_next.restore()
            self.before_next = None
        drawn, sent = indices_drawn(loader, iterated=True), 0
        for number, batch in enumerate(iterator):
            if training and not self._agree(True):
                rank_zero_warn(
                    "Replicas have different numbers of training batches: the epoch ends with "
                    "the first of them. Divide the data equally, e.g. by "
                    "trainer.distributed_sampler_kwargs."
                )
                break
            check_examples(batch, loader, is_first=number == 0)
            self._send(Message(GeneratorStates.current(), batch, drawn[sent:]))
            sent = len(drawn)
            yield batch
        else:
            if training:
                self._agree(False)
        self._send(Message(GeneratorStates.current(), is_end=True))

    def _receive(self, drawn: List[object]) -> Iterator[object]:
        while True:
            message = self._next_message()
            message.generators.restore()
            if message.is_end:
                return
            drawn += message.indices
            yield message.batch

    def _next_message(self) -> Message:
        message = messages.receive(self.mesh.data_group)
        assert isinstance(message, Message)
        return message

    def _agree(self, has_one: bool) -> bool:
        return all_replicas(has_one, self.mesh, self.device)

    def _send(self, message: Message) -> None:
        if dist.get_world_size(self.mesh.data_group) == 1:
            return
        try:
            packed = messages.pack(message)
        except Exception as error:
            raise UserError(
                f"A batch of type {type(message.batch).__name__} cannot be sent to the other "
                f"stages, because it cannot be pickled: {error} Return tensors and plain values "
                "from the dataset and the collate function."
            ) from error
        messages.send(packed, self.mesh.data_group)


class _Iterable:
    """Any iterable, with a class that can be derived from."""

    def __init__(self, iterable: Iterable[object]) -> None:
        self.iterable = iterable

    def __iter__(self) -> Iterator[object]:
        return iter(self.iterable)

    def __len__(self) -> int:
        if not isinstance(self.iterable, Sized):
            raise TypeError(f"object of type {type(self.iterable).__name__!r} has no len()")
        return len(self.iterable)
