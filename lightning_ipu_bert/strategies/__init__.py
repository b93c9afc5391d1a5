"""Strategies that run the stages of a module under Lightning."""

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from lightning_ipu_bert.strategies.distributed.strategy import PipelineParallelStrategy
from lightning_ipu_bert.strategies.ipu.accelerator import IPUAccelerator
from lightning_ipu_bert.strategies.ipu.strategy import IPUStrategy

__all__ = ["IPUAccelerator", "IPUStrategy", "PipelineParallelStrategy", "register_strategies"]


IPU_NAME = "ipu_pipeline"


def register_strategies() -> None:
    """Register the strategies and the accelerator with Lightning; idempotent."""
    for name, start_method in (("pipeline", "popen"), ("pipeline_notebook", "fork")):
        if name not in StrategyRegistry:
            StrategyRegistry.register(
                name,
                PipelineParallelStrategy,
                description=f"Pipeline parallelism, with ranks started by {start_method}",
                start_method=start_method,
            )
    if IPU_NAME not in StrategyRegistry:
        StrategyRegistry.register(IPU_NAME, IPUStrategy, description="Pipeline parallelism on IPUs")
    if IPUAccelerator.name() not in AcceleratorRegistry:
        AcceleratorRegistry.register(
            IPUAccelerator.name(), IPUAccelerator, description="Graphcore IPUs, through PopTorch"
        )
