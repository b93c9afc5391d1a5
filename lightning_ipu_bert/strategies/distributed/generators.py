"""Random states of replicas: they differ from the first training batch on, and are resumed."""

from __future__ import annotations

from typing import Any, Dict, List

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from lightning_ipu_bert.checkpoint_file import GENERATORS_KEY
from lightning_ipu_bert.strategies.distributed.mesh import Mesh
from lightning_ipu_bert.strategies.distributed.reading import ReplicaReader
from lightning_ipu_bert.training.random_states import GeneratorStates, seed_generators


class ReplicaGenerators:
    """Random states of the replicas of a run.

    Until training starts, all ranks have one random state: splits, shuffles and initial weights are
    the same. Then steps and loaders of different replicas draw different numbers.
    """

    def __init__(self, mesh: Mesh, reader: ReplicaReader, loaded: List[GeneratorStates]) -> None:
        """Create the states of a run.

        Args:
            mesh: Mesh coordinates and groups of this rank.
            reader: Reads the loaders of this replica.
            loaded: States of the replicas in the checkpoint from which the run resumes, or [].
        """
        self.mesh = mesh
        self.reader = reader
        self.loaded = loaded

    def begin(self, trainer: Trainer) -> None:
        """Continue the states of a checkpoint, or let those of replicas differ."""
        states, self.loaded = self.loaded, []
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if len(states) != self.reader.num_replicas:
            if self.mesh.replica:
                seed_generators(GeneratorStates.current().seed(f"replica {self.mesh.replica}"))
        elif progress.current.ready and not progress.is_last_batch:
            self.reader.before_next = states[self.mesh.replica]  # resumes in the middle of an epoch
        else:
            states[self.mesh.replica].restore()
        # Steps may draw on GPUs, too: alike in a replica.
        begin = self.reader.before_next or GeneratorStates.current()
        torch.cuda.manual_seed_all(begin.seed("devices"))

    def save(self, checkpoint: Dict[str, object]) -> None:
        """Add the states of all replicas, on the first ranks of the replicas."""
        if self.mesh.pipeline_rank:
            return
        parts: List[Dict[str, object]] = [{}] * self.reader.num_replicas
        own = GeneratorStates.current()._asdict()
        dist.all_gather_object(parts, own, group=self.mesh.replica_group)
        checkpoint[GENERATORS_KEY] = parts


def generators_in(checkpoint: Dict[str, Any]) -> List[GeneratorStates]:
    """Return the states in a checkpoint; [] if it was not saved by replicas."""
    return [GeneratorStates.of(state) for state in checkpoint.get(GENERATORS_KEY, [])]
