"""The batch algebra: what one weight update consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

from lightning_ipu_bert.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of batches, in examples unless said otherwise."""

    micro_batch_size: int
    """What a stage processes at a time."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of a replica between two weight updates."""
    replication_factor: int = 1
    """Copies of the pipeline."""
    device_iterations: int = 1
    """Weight updates of one call from the host; above 1 only on IPUs."""

    @property
    def replica_batch_size(self) -> int:
        """Examples of one replica in a weight update: what a loader yields."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    @property
    def global_batch_size(self) -> int:
        """Examples in a weight update, over all replicas."""
        return self.replica_batch_size * self.replication_factor

    @property
    def host_batch_size(self) -> int:
        """Examples in one call from the host."""
        return self.global_batch_size * self.device_iterations


def micro_batch_size_of(batch_size: int, gradient_accumulation_steps: int) -> int:
    """Return the micro-batch of a loader that yields `batch_size` examples.

    Raises:
        UserError: If the micro-batches do not divide the batch.
    """
    size, rest = divmod(batch_size, gradient_accumulation_steps)
    if rest or not size:
        above = (size + 1) * gradient_accumulation_steps
        raise UserError(
            f"batch_size={batch_size} does not part into gradient_accumulation_steps="
            f"{gradient_accumulation_steps} equal micro-batches. Use a multiple of "
            f"{gradient_accumulation_steps}, e.g. batch_size={above}."
        )
    return size


def equal_micro_batches(examples: int, micro_batch_size: int) -> Tuple[int, int]:
    """Return number and size of equal micro-batches that hold exactly `examples`.

    A ragged last batch is cut into more and smaller micro-batches than planned: none is lost, none
    is padded, and the mean over equal micro-batches stays the mean over the examples.
    """
    size = next(s for s in range(min(examples, micro_batch_size), 0, -1) if examples % s == 0)
    return examples // size, size
