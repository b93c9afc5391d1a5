"""Reading on one rank of each replica; the other stages receive its batches.

A loader's dataset, sampler, workers and collate function run on the first rank of a replica only.
The states of its random generators travel with the batches, so that a step that draws numbers
(mixup) draws the same ones on all ranks of the replica, as in a single process.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import (
    Any,
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
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader

from lightning_ipu_bert._compat.loaders import indices_drawn, iterated_by_a_loop, sampler_of
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.strategies.distributed import messages, shared_reading
from lightning_ipu_bert.strategies.distributed.lengths import (
    evaluates_together,
    length_of_loop,
    lengths_in_replicas,
    warn_of_unequal,
)
from lightning_ipu_bert.strategies.distributed.loaders import ReplicaShare, check_examples
from lightning_ipu_bert.strategies.distributed.mesh import Mesh
from lightning_ipu_bert.strategies.distributed.step_replicas import Replicas, StepReplicas
from lightning_ipu_bert.training.random_states import GeneratorStates, seed_generators


class Message(NamedTuple):
    """What the reading rank of a replica sends to the others."""

    generators: GeneratorStates
    """Random states after reading."""
    batch: object = None
    indices: Sequence[object] = ()
    """Indices of the batches drawn since the previous message, in `predict`."""
    is_end: bool = False
    replicas: Replicas = ()
    """The replicas that run the step of the batch."""
    is_divided: bool = True
    """Whether the examples of the epoch are divided among replicas."""


class ReplicaReader:
    """Lets the loops of a Trainer iterate over loaders on one rank of each replica."""

    def __init__(self, mesh: Mesh, device: torch.device, replicas: StepReplicas) -> None:
        """Create the reader of a run.

        Args:
            mesh: Mesh coordinates and groups of this rank.
            device: Device of the collectives of replicas.
            replicas: The replicas that run a step.
        """
        self.mesh = mesh
        self.device = device
        self.replicas = replicas
        self.reads = mesh.pipeline_rank == 0
        """Whether this rank reads."""
        self.before_next: Optional[GeneratorStates] = None
        """States to restore before the next training batch is read: a run resumes in an epoch."""
        self._order_seed: Optional[int] = None
        self._divides = True  # whether the loaders of an evaluation are divided among replicas
        self._attached: List[Tuple[object, type]] = []

    def attach(self, loader: Iterable[object], stage: RunningStage) -> Iterable[object]:
        """Return the loader, which is read by one rank of each replica.

        Its class is replaced by a derived one until `detach`, so that the object, and all that
        callbacks know of it, remains the one of the user.

        Args:
            loader: An iterable over batches.
            stage: What its batches are for.
        """
        lengths = lengths_in_replicas(loader, self.mesh, self.device)
        if stage == RunningStage.TRAINING:
            warn_of_unequal(lengths)
        if lengths and not min(lengths) and evaluates_together(stage):
            self._divides = False
        if self.num_replicas > 1 and isinstance(loader, DataLoader):
            self._order_alike(sampler_of(loader))
        try:
            self._derive(loader, lengths, stage)
        except TypeError:  # of built-in types: a list of batches, a generator
            loader = _Iterable(loader)
            self._derive(loader, lengths, stage)
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
        if not isinstance(sampler, (DistributedSamplerWrapper, ReplicaShare)):
            return
        kind: Any = type(sampler)

        def __iter__(own: object) -> Iterator[object]:  # noqa: N807
            with self._drawing_alike():
                return iter(kind.__iter__(own))

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

    def _derive(self, loader: Iterable[object], lengths: List[int], stage: RunningStage) -> None:
        kind: Type[Iterable[object]] = type(loader)

        def __iter__(own: Iterable[object]) -> Iterator[object]:  # noqa: N807
            read: Callable[[], Iterator[object]] = partial(kind.__iter__, own)
            return self._begin(own, read, stage) if iterated_by_a_loop() else read()

        def __len__(own: object) -> int:  # noqa: N807
            if not lengths:
                raise TypeError(f"object of type {kind.__name__!r} has no len()")
            # Whether the data is divided is known once all loaders are attached.
            return length_of_loop(lengths, stage, self._divides)

        loader.__class__ = type(kind.__name__, (kind,), {"__iter__": __iter__, "__len__": __len__})
        self._attached.append((loader, kind))

    def _begin(
        self, loader: object, read: Callable[[], Iterator[object]], stage: RunningStage
    ) -> Iterator[object]:
        """Create the iterator of an epoch, on all ranks together."""
        if not self.reads:
            self._next_message().generators.restore()
            return self._receive(indices_drawn(loader, iterated=False))
        if self.num_replicas > 1:
            seed = torch.tensor(GeneratorStates.current().seed("order"), device=self.device)
            dist.broadcast(
                seed, dist.get_global_rank(self.mesh.replica_group, 0), self.mesh.replica_group
            )
            self._order_seed = int(seed)
        iterator = read()
        self._send(Message(GeneratorStates.current()))
        replicas, device = self.replicas, self.device
        if stage == RunningStage.TRAINING:
            batches = shared_reading.training_batches(self._resumed(iterator), replicas, device)
        else:
            batches = shared_reading.evaluation_batches(
                iterator, replicas, device, evaluates_together(stage), self._divides
            )
        return self._read(loader, batches)

    def _resumed(self, iterator: Iterator[object]) -> Iterator[object]:
        """Yield batches, the first one with the random states from which a run resumes."""
        if self.before_next is not None:
            self.before_next.restore()
            self.before_next = None
        yield from iterator

    def _read(self, loader: object, batches: Iterator[Tuple[object, Replicas]]) -> Iterator[object]:
        """Send the batches to the other stages of this replica, and yield them."""
        drawn, sent = indices_drawn(loader, iterated=True), 0
        for number, (batch, replicas) in enumerate(batches):
            check_examples(batch, loader, is_first=number == 0)
            self.replicas.read(replicas)
            divided = self.replicas.is_divided
            states = GeneratorStates.current()
            self._send(Message(states, batch, drawn[sent:], False, replicas, divided))
            sent = len(drawn)
            yield batch
        self._send(Message(GeneratorStates.current(), is_end=True))

    def _receive(self, drawn: List[object]) -> Iterator[object]:
        while True:
            message = self._next_message()
            message.generators.restore()
            if message.is_end:
                return
            drawn += message.indices
            if not message.is_divided:
                self.replicas.evaluate_alone()
            self.replicas.read(message.replicas)
            yield message.batch

    def _next_message(self) -> Message:
        message = messages.receive(self.mesh.data_group)
        assert isinstance(message, Message)
        return message

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
    """An iterable, with a class that can be derived from."""

    def __init__(self, iterable: Iterable[object]) -> None:
        self.iterable = iterable

    def __iter__(self) -> Iterator[object]:
        return iter(self.iterable)

    def __len__(self) -> int:
        if not isinstance(self.iterable, Sized):
            raise TypeError(f"object of type {type(self.iterable).__name__!r} has no len()")
        return len(self.iterable)
