"""The batch algebra: examples per micro-batch, weight update and call of a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Tuple

from lightning_ipu_bert.pipeline.rules import Violation, enforce


@dataclass(frozen=True)
class BatchAlgebra:
    """Micro-batches per weight update, and weight updates per call.

    micro-batch x gradient_accumulation_steps x replication_factor = global batch = one update.
    """

    gradient_accumulation_steps: int = 1
    """Micro-batches of a replica per weight update."""
    replication_factor: int = 1
    """Number of copies of the pipeline."""
    device_iterations: int = 1
    """Weight updates per call from the host; above 1 only on IPUs."""

    @property
    def micro_batches_per_call(self) -> int:
        """Micro-batches per call from the host, over all replicas."""
        return self.device_iterations * self.gradient_accumulation_steps * self.replication_factor

    def replica_batch_size(self, micro_batch_size: int) -> int:
        """Return the examples of one replica per weight update, which is the batch of a loader."""
        return micro_batch_size * self.gradient_accumulation_steps

    def global_batch_size(self, micro_batch_size: int) -> int:
        """Return the examples per weight update, over all replicas."""
        return self.replica_batch_size(micro_batch_size) * self.replication_factor

    def host_batch_size(self, micro_batch_size: int) -> int:
        """Return the examples per call from the host."""
        return self.global_batch_size(micro_batch_size) * self.device_iterations


def batch_size_rule(batch_size: int, gradient_accumulation_steps: int) -> Iterator[Violation]:
    """The batch of a loader must be divisible into equal micro-batches."""
    size, remainder = divmod(batch_size, gradient_accumulation_steps)
    if remainder or not size:
        yield Violation(
            "batch_size",
            batch_size,
            f"must be divisible by gradient_accumulation_steps={gradient_accumulation_steps}, the "
            "micro-batches of a batch",
            f"Use a multiple of {gradient_accumulation_steps}, "
            f"e.g. batch_size={(size + 1) * gradient_accumulation_steps}.",
        )


def micro_batch_size_of(batch_size: int, gradient_accumulation_steps: int) -> int:
    """Return the micro-batch size for a loader with batches of `batch_size` examples.

    Raises:
        UserError: If the batch size is not divisible.
    """
    enforce(batch_size_rule(batch_size, gradient_accumulation_steps))
    return batch_size // gradient_accumulation_steps


def equal_micro_batches(examples: int, micro_batch_size: int) -> Tuple[int, int]:
    """Return the number and size of equal micro-batches that hold exactly `examples`.

    A ragged last batch is split into more and smaller micro-batches than planned: no example is
    dropped or padded, and the mean over equal micro-batches remains the mean over the examples.
    """
    size = next(s for s in range(min(examples, micro_batch_size), 0, -1) if examples % s == 0)
    return examples // size, size
