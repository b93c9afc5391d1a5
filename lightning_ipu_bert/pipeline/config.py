"""`PipelineConfig`: configuration of stages, replicas and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Iterator, List, Optional

from lightning_ipu_bert.pipeline.batches import BatchAlgebra
from lightning_ipu_bert.pipeline.plan import PipelineShape
from lightning_ipu_bert.pipeline.rules import Violation, count_rule, layers_rule
from lightning_ipu_bert.pipeline.schedules import micro_batch_rules, schedule_rules


@dataclass(frozen=True)
class PipelineConfig:
    """How a model is split into stages and how micro-batches are scheduled.

    Values are not checked on creation; `value_rules` and `training_rules` yield violations.
    """

    layers_per_stage: Optional[List[int]] = None
    """Number of layers on each stage, e.g. [3, 7, 7, 7]; stages with -1 share the remaining layers
    equally. Blocks before the layers are placed on the first stage, blocks after them on the last.
    Null places one stage of equal size on every device."""
    replication_factor: int = 1
    """Number of copies of the pipeline; each processes its own shard of the data."""
    gradient_accumulation_steps: Optional[int] = None
    """Micro-batches of a replica per weight update. Null is 1, or the number of stages if
    layers_per_stage is null."""
    stages_per_rank: int = 1
    """Stages per process (looped: every n-th stage); 1 places each stage in its own process."""
    schedule: str = "1f1b"
    """Pipeline schedule: gpipe, 1f1b, interleaved_1f1b or zero_bubble."""
    recompute_checkpoint_every_layer: bool = False
    """Store only the inputs of layers and recompute their activations in the backward pass."""
    replicated_tensor_sharding: bool = False
    """Shard the optimizer state over the replicas (RTS, ZeRO stage 1)."""
    optimizer_state_offchip: bool = False
    """Store the optimizer state in host memory."""

    def for_devices(self, num_devices: int) -> PipelineConfig:
        """Return the configuration with one stage per device if `layers_per_stage` is null."""
        if self.layers_per_stage is not None:
            return self
        stages = max(1, num_devices // max(1, self.replication_factor))
        steps = self.gradient_accumulation_steps or stages
        return replace(self, layers_per_stage=[-1] * stages, gradient_accumulation_steps=steps)

    @property
    def batches(self) -> BatchAlgebra:
        """The batch algebra of training."""
        return BatchAlgebra(self.gradient_accumulation_steps or 1, self.replication_factor)

    @property
    def shape(self) -> PipelineShape:
        """The requested pipeline, for training and inference."""
        return PipelineShape(
            tuple(self.layers_per_stage or [-1]), self.batches, self.stages_per_rank
        )

    def value_rules(self) -> Iterator[Violation]:
        """Rules for single values."""
        if self.layers_per_stage is not None:
            yield from layers_rule("layers_per_stage", self.layers_per_stage)
        for field in ("replication_factor", "stages_per_rank"):
            yield from count_rule(field, vars(self)[field])
        if self.gradient_accumulation_steps is not None:
            yield from count_rule("gradient_accumulation_steps", self.gradient_accumulation_steps)
        yield from schedule_rules(self.schedule, self.stages_per_rank)

    def shape_rules(self) -> Iterator[Violation]:
        """Rules for combinations of values, after `value_rules` hold and the devices are known."""
        shape = self.shape
        if shape.num_stages % shape.stages_per_rank:
            yield Violation(
                "stages_per_rank",
                self.stages_per_rank,
                f"must divide the {shape.num_stages} stages of layers_per_stage="
                f"{self.layers_per_stage}",
                "Use a divisor, or change the number of stages.",
            )

    def training_rules(self) -> Iterator[Violation]:
        """Rules for training: the schedule has enough micro-batches."""
        shape, steps = self.shape, self.batches.gradient_accumulation_steps
        yield from micro_batch_rules(
            self.schedule, shape.num_stages, shape.ranks_per_replica, steps
        )

    def device_rules(self, num_processes: int, num_nodes: int = 1) -> Iterator[Violation]:
        """The number of ranks must match the pipeline."""
        shape = self.shape
        if num_processes * num_nodes != shape.num_devices:
            nodes = f" x num_nodes={num_nodes}" if num_nodes > 1 else ""
            yield Violation(
                f"devices={num_processes}{nodes}",
                None,
                f"must be {shape.num_devices}: {shape.num_stages} stages on "
                f"{shape.ranks_per_replica} ranks x replication_factor={self.replication_factor}",
                f"Set devices to {shape.num_devices}{' in total' if num_nodes > 1 else ''}, or "
                "change the stages or replicas.",
            )
