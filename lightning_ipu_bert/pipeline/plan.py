"""The plan of a run, resolved once from a configuration and the blocks of a module.

Stages are lists of block names; a block is a submodule that is placed as a unit. Blocks whose names
differ only in a trailing number (``bert.encoder.layer.0``, ``bert.encoder.layer.1``, ...) are the
layers that `layers_per_stage` counts.
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
    """A pipeline as requested by a configuration, before the module is known."""

    layers_per_stage: Tuple[int, ...]
    batches: BatchAlgebra
    stages_per_rank: int = 1

    @property
    def num_stages(self) -> int:
        """Number of stages of a replica."""
        return len(self.layers_per_stage)

    @property
    def ranks_per_replica(self) -> int:
        """Number of devices of a replica."""
        return self.num_stages // self.stages_per_rank

    @property
    def num_devices(self) -> int:
        """Number of devices of all replicas: ranks or IPUs."""
        return self.ranks_per_replica * self.batches.replication_factor


@dataclass(frozen=True)
class PipelinePlan:
    """A resolved pipeline: the blocks of every stage, and the batch algebra."""

    shape: PipelineShape
    stages: Tuple[Tuple[str, ...], ...]
    """The blocks of every stage, in forward order."""

    @property
    def batches(self) -> BatchAlgebra:
        """The batch algebra."""
        return self.shape.batches

    @property
    def num_stages(self) -> int:
        """Number of stages of a replica."""
        return self.shape.num_stages

    @property
    def ranks_per_replica(self) -> int:
        """Number of devices of a replica."""
        return self.shape.ranks_per_replica

    def stages_on(self, pipeline_rank: int) -> List[int]:
        """Return the stages placed on a pipeline rank, in order."""
        return list(range(pipeline_rank, self.num_stages, self.ranks_per_replica))

    def rank_of(self, stage: int) -> int:
        """Return the pipeline rank that a stage is placed on."""
        return stage % self.ranks_per_replica


@dataclass(frozen=True)
class Plan:
    """The resolved plan of a run, used by executors, annotations, checks and tables.

    A pipeline that the run does not need is None, and its rules do not apply.
    """

    training: Optional[PipelinePlan]
    inference: Optional[PipelinePlan]
    blocks: Tuple[str, ...]
    """Names of all blocks in forward order."""
    layers: Tuple[str, ...]
    """The numbered blocks, which are recomputed if `recompute` is set."""
    stages_of_parameter: Mapping[str, Tuple[int, ...]]
    """The stages that hold each parameter, by each name of the parameter."""
    labels: Mapping[str, str]
    """Display names, by block or by series of numbered blocks."""
    schedule: str = "1f1b"
    recompute: bool = False
    """Store only the inputs of layers and recompute their activations in the backward pass."""
    replicated_tensor_sharding: bool = False
    optimizer_state_offchip: bool = False

    def of(self, training: bool) -> PipelinePlan:
        """Return the training or the inference pipeline."""
        pipeline = self.training if training else self.inference
        assert pipeline is not None, "the plan was resolved without this pipeline"
        return pipeline

    @property
    def main(self) -> PipelinePlan:
        """The training pipeline if there is one, else the inference pipeline."""
        return self.of(training=self.training is not None)

    @property
    def shards_optimizer(self) -> bool:
        """Whether the optimizer state is sharded, which requires several replicas."""
        return self.replicated_tensor_sharding and self.main.batches.replication_factor > 1

    def stages_of(self, name: str) -> Tuple[int, ...]:
        """Return the stages that hold an entry of the state dict; empty if it is in no block."""
        if name in self.stages_of_parameter:
            return self.stages_of_parameter[name]
        block = block_of(name, self.blocks)
        return () if block is None else _stages_with(self.main, {block})

    def lines(self) -> Iterator[str]:
        """Yield what a run prints about its plan: notices and the table "Device Allocation"."""
        if self.replicated_tensor_sharding and not self.shards_optimizer:
            yield (
                "replicated_tensor_sharding has no effect with replication_factor=1: there is no "
                "other replica to shard the optimizer state over."
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
        training: The training pipeline, or None if the run does not train.
        inference: The inference pipeline, or None if the run does not evaluate.
        schedule: Name of the training schedule.
        recompute: Whether layers are recomputed.
        replicated_tensor_sharding: Whether to shard the optimizer state.
        optimizer_state_offchip: Whether to store the optimizer state in host memory.

    Raises:
        UserError: If the layers cannot be placed as configured.
    """
    plans = {
        shape: PipelinePlan(shape, partition(outline.blocks, shape.layers_per_stage))
        for shape in dict.fromkeys((training, inference))
        if shape is not None
    }
    main = next(iter(plans.values()))
    stages_of_parameter = {
        name: _stages_with(main, owners) for name, owners in outline.blocks_of_parameter.items()
    }
    return Plan(
        training=plans[training] if training else None,
        inference=plans[inference] if inference else None,
        blocks=outline.blocks,
        layers=find_layers(outline.blocks),
        stages_of_parameter=stages_of_parameter,
        labels=outline.labels,
        schedule=schedule,
        recompute=recompute,
        replicated_tensor_sharding=replicated_tensor_sharding,
        optimizer_state_offchip=optimizer_state_offchip,
    )


def _stages_with(pipeline: PipelinePlan, blocks: AbstractSet[str]) -> Tuple[int, ...]:
    return tuple(i for i, stage in enumerate(pipeline.stages) if blocks & set(stage))


def find_layers(blocks: Sequence[str]) -> Tuple[str, ...]:
    """Return the longest sequence of blocks whose names differ only in a trailing number."""
    runs = [tuple(run) for series, run in groupby(blocks, series_of) if series is not None]
    return max(runs, key=len, default=())


def layer_rules(blocks: Sequence[str], layers_per_stage: Sequence[int]) -> Iterator[Violation]:
    """The layers of all stages must add up to those of the model, and no stage may be empty."""
    field, value, count = "layers_per_stage", list(layers_per_stage), len(find_layers(blocks))
    fixed = sum(number for number in value if number != -1)
    if fixed > count or (fixed < count and -1 not in value):
        yield Violation(
            field,
            value,
            f"places {fixed} layers, but the model has {count}",
            f"Change the numbers to add up to {count}, or use -1 for one of them.",
        )
        return
    stages = _cut(blocks, value)
    if not all(stages):
        yield Violation(
            field,
            value,
            f"leaves stage {stages.index(())} without a block",
            "Place a layer on it, or use fewer stages (0 is allowed on the first and the last "
            "stage, which hold other blocks).",
        )


def partition(
    blocks: Sequence[str], layers_per_stage: Sequence[int]
) -> Tuple[Tuple[str, ...], ...]:
    """Return the blocks of every stage, in forward order.

    Blocks before the layers are placed on the first stage, blocks after them on the last. Stages
    with -1 share the remaining layers equally; the last of them takes the remainder.

    Args:
        blocks: Names of all blocks in forward order.
        layers_per_stage: Layers of each stage; see `PipelineConfig`.

    Raises:
        UserError: If `layer_rules` are violated.

    Source:
        `layers_per_ipu` of IPUConfig in optimum-graphcore, which has the same semantics.
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
