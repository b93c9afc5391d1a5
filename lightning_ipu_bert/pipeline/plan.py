"""The plan: what a run follows, resolved once from a configuration and a module's blocks.

Stages are lists of block names; a block is a named part of a model that is placed as a whole.
Blocks whose names are alike but for a number at the end (``bert.encoder.layer.0``,
``bert.encoder.layer.1``, ...) are the layers, which `layers_per_stage` counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import AbstractSet, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from lightning_ipu_bert.pipeline.batches import BatchAlgebra
from lightning_ipu_bert.pipeline.blocks import ModuleOutline, block_of, series_of
from lightning_ipu_bert.pipeline.rules import Violation, enforce
from lightning_ipu_bert.pipeline.table import device_allocation


class PipelineShape(NamedTuple):
    """One pipeline as a configuration asks for it, before the module is known."""

    layers_per_stage: Tuple[int, ...]
    batches: BatchAlgebra
    stages_per_rank: int = 1

    @property
    def num_stages(self) -> int:
        """Stages of one replica."""
        return len(self.layers_per_stage)

    @property
    def ranks_per_replica(self) -> int:
        """Devices that hold one replica."""
        return self.num_stages // self.stages_per_rank

    @property
    def num_devices(self) -> int:
        """Devices of all replicas: ranks or IPUs."""
        return self.ranks_per_replica * self.batches.replication_factor


@dataclass(frozen=True)
class PipelinePlan:
    """One resolved pipeline: what every stage holds, and what a batch consists of."""

    shape: PipelineShape
    stages: Tuple[Tuple[str, ...], ...]
    """The blocks of every stage, in forward order."""

    @property
    def batches(self) -> BatchAlgebra:
        """What an update and a call consist of."""
        return self.shape.batches

    @property
    def num_stages(self) -> int:
        """Stages of one replica."""
        return self.shape.num_stages

    @property
    def ranks_per_replica(self) -> int:
        """Devices that hold one replica."""
        return self.shape.ranks_per_replica

    def stages_on(self, pipeline_rank: int) -> List[int]:
        """Return the stages that a rank of a replica holds, in order."""
        return list(range(pipeline_rank, self.num_stages, self.ranks_per_replica))

    def rank_of(self, stage: int) -> int:
        """Return the pipeline rank that holds a stage."""
        return stage % self.ranks_per_replica


@dataclass(frozen=True)
class Plan:
    """What a run follows. Executors, annotations, checks and tables take it; nobody resolves again.

    A pipeline that the run does not need is None, and its rules do not apply.
    """

    training: Optional[PipelinePlan]
    inference: Optional[PipelinePlan]
    blocks: Tuple[str, ...]
    """Names of all blocks in forward order."""
    layers: Tuple[str, ...]
    """The numbered blocks, which are recomputed where recomputation is on."""
    stages_of_parameter: Mapping[str, Tuple[int, ...]]
    """For every parameter, by each of its names, the stages that hold it."""
    labels: Mapping[str, str]
    """Names for people, by block or by series of numbered ones."""
    schedule: str = "1f1b"
    recompute: bool = False
    """Keep only the inputs of layers and recompute their activations in the backward."""
    replicated_tensor_sharding: bool = False
    optimizer_state_offchip: bool = False

    def of(self, training: bool) -> PipelinePlan:
        """Return the pipeline that trains, or the one that evaluates."""
        pipeline = self.training if training else self.inference
        assert pipeline is not None, "the plan was resolved for another run"
        return pipeline

    @property
    def main(self) -> PipelinePlan:
        """The pipeline that trains, else the one that evaluates."""
        return self.of(training=self.training is not None)

    @property
    def shards_optimizer(self) -> bool:
        """Whether the optimizer state is sharded: one replica has none to share it with."""
        return self.replicated_tensor_sharding and self.main.batches.replication_factor > 1

    def stages_of(self, name: str) -> Tuple[int, ...]:
        """Return the stages that hold an entry of the state dict; none if it is in no block."""
        if name in self.stages_of_parameter:
            return self.stages_of_parameter[name]
        return _stages_with(self.main, {block_of(name, self.blocks)})

    def lines(self) -> Iterator[str]:
        """Return what a run prints of its plan: notices, and the table "Device Allocation"."""
        if self.replicated_tensor_sharding and not self.shards_optimizer:
            yield (
                "replicated_tensor_sharding is off: with replication_factor=1 there is no other "
                "replica to share the optimizer state with."
            )
        yield device_allocation(self.main.stages, self.labels)


def resolve(
    outline: ModuleOutline,
    training: Optional[PipelineShape],
    inference: Optional[PipelineShape],
    *,
    schedule: str = "1f1b",
    recompute: bool = False,
    replicated_tensor_sharding: bool = False,
    optimizer_state_offchip: bool = False,
) -> Plan:
    """Resolve a configuration for a module.

    Args:
        outline: The module's blocks and parameters.
        training: The pipeline that trains, if the run does.
        inference: The pipeline that evaluates, if the run does.
        schedule: Name of the schedule that trains.
        recompute: Whether layers are recomputed.
        replicated_tensor_sharding: Whether the optimizer state is to be sharded.
        optimizer_state_offchip: Whether it is kept off the device.

    Raises:
        UserError: If the layers cannot be placed.
    """
    plans = {
        shape: PipelinePlan(shape, partition(outline.blocks, shape.layers_per_stage))
        for shape in dict.fromkeys((training, inference))
        if shape is not None
    }
    main = next(iter(plans.values()))
    homes = {
        name: _stages_with(main, owners) for name, owners in outline.blocks_of_parameter.items()
    }
    return Plan(
        training=plans[training] if training else None,
        inference=plans[inference] if inference else None,
        blocks=outline.blocks,
        layers=find_layers(outline.blocks),
        stages_of_parameter=homes,
        labels=outline.labels,
        schedule=schedule,
        recompute=recompute,
        replicated_tensor_sharding=replicated_tensor_sharding,
        optimizer_state_offchip=optimizer_state_offchip,
    )


def _stages_with(pipeline: PipelinePlan, blocks: AbstractSet[Optional[str]]) -> Tuple[int, ...]:
    return tuple(i for i, stage in enumerate(pipeline.stages) if blocks & set(stage))


def find_layers(blocks: Sequence[str]) -> Tuple[str, ...]:
    """Return the longest run of blocks whose names differ only in the number at the end."""
    runs = [tuple(run) for series, run in groupby(blocks, series_of) if series is not None]
    return max(runs, key=len, default=())


def layer_rules(blocks: Sequence[str], layers_per_stage: Sequence[int]) -> Iterator[Violation]:
    """The layers of all stages sum up to the model's, and no stage is left without a block."""
    field, value, count = "layers_per_stage", list(layers_per_stage), len(find_layers(blocks))
    fixed = sum(number for number in value if number != -1)
    if fixed > count or (fixed < count and -1 not in value):
        yield Violation(
            field,
            value,
            f"places {fixed} layers, but the model has {count}",
            f"Make the numbers sum up to {count}, or put -1 for one of them.",
        )
        return
    stages = _cut(blocks, value)
    if not all(stages):
        yield Violation(
            field,
            value,
            f"leaves stage {stages.index(())} without a block",
            "Give it a layer, or use fewer stages (0 is possible at the ends, where other blocks "
            "are placed).",
        )


def partition(
    blocks: Sequence[str], layers_per_stage: Sequence[int]
) -> Tuple[Tuple[str, ...], ...]:
    """Return the blocks of every stage, in forward order.

    Blocks before the layers are placed on the first stage, blocks after them on the last. Every -1
    is an equal share of the remaining layers, the last of them takes the remainder.

    Args:
        blocks: Names of all blocks in forward order.
        layers_per_stage: Layers of each stage; see `PipelineConfig`.

    Raises:
        UserError: If `layer_rules` are broken.

    Source:
        `layers_per_ipu` of optimum-graphcore's IPUConfig, which counts in the same way.
    """
    enforce(layer_rules(blocks, layers_per_stage))
    return _cut(blocks, layers_per_stage)


def _cut(blocks: Sequence[str], layers_per_stage: Sequence[int]) -> Tuple[Tuple[str, ...], ...]:
    layers = find_layers(blocks)
    counts, wildcards = list(layers_per_stage), [i for i, n in enumerate(layers_per_stage) if n < 0]
    rest = len(layers) - sum(n for n in counts if n >= 0)
    for i in wildcards:
        counts[i] = rest // len(wildcards)
    if wildcards:
        counts[wildcards[-1]] += rest % len(wildcards)
    first = blocks.index(layers[0]) if layers else 0
    ends = [first + sum(counts[: stage + 1]) for stage in range(len(counts))]
    ends[-1] = len(blocks)
    return tuple(tuple(blocks[a:b]) for a, b in zip([0, *ends], ends))
