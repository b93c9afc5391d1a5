"""What a run on IPUs says before it begins."""

from __future__ import annotations

from dataclasses import fields
from shlex import quote
from typing import Any, Iterator, Mapping

from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.pipeline.ipu_config import IPUConfig
from lightning_ipu_bert.pipeline.partition import device_allocation, partition


def plan_lines(config: IPUConfig, module: Any, overridden: Mapping[str, Any]) -> Iterator[str]:
    """Return what is taken over, what is not, and where the blocks lie.

    Args:
        config: How the module runs.
        module: The `PipelineModule`.
        overridden: Values that took the place of an IPU config's, by name.
    """
    for name, value in overridden.items():
        yield f"Overriding IPU config: {name}={value}"
    for field, reason in config.ignored():
        yield f"IPU config: {field} has no effect: {reason}."
    if config.replicated_tensor_sharding and not config.shards_optimizer:
        yield (
            "replicated_tensor_sharding is off: with replication_factor=1 there is no other "
            "replica to share the optimizer's state with."
        )
    stages = partition(list(module.pipeline_blocks()), config.training.layers_per_ipu)
    yield device_allocation(stages, module.block_labels)


def flags_without_ipus(plan: PipelineConfig, given: Mapping[str, Any]) -> str:
    """Return the flags that run a plan on a pipeline of ranks, beside its class_path.

    Args:
        plan: The plan.
        given: What of it the strategy was given by name, which stays where the class changes.
    """
    flags = [f"--trainer.devices {plan.world_size}"]
    for field in fields(PipelineConfig):
        value = getattr(plan, field.name)
        if given.get(field.name) is None and value != field.default:
            flags.append(f"--trainer.strategy.init_args.{field.name} {quote(str(value))}")
    return " ".join(flags)
