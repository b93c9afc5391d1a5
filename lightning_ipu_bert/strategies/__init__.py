"""Strategies: who runs the stages, and how Lightning sees it."""

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from lightning_ipu_bert.strategies.distributed.strategy import PipelineParallelStrategy
from lightning_ipu_bert.strategies.ipu.accelerator import IPUAccelerator
from lightning_ipu_bert.strategies.ipu.strategy import IPUStrategy

__all__ = ["IPUAccelerator", "IPUStrategy", "PipelineParallelStrategy", "register_strategies"]


IPU_NAME = "ipu_pipeline"


def register_strategies() -> None:
    """Let `Trainer(strategy="pipeline")` and its relatives find us; doing so twice does no harm."""
    for name, start_method in (("pipeline", "popen"), ("pipeline_notebook", "fork")):
        if name not in StrategyRegistry:
            StrategyRegistry.register(
                name,
                PipelineParallelStrategy,
                description=f"pipeline stages and replicas, ranks started by {start_method}",
                start_method=start_method,
            )
    if IPU_NAME not in StrategyRegistry:
        StrategyRegistry.register(IPU_NAME, IPUStrategy, description="stages and replicas on IPUs")
    if IPUAccelerator.name() not in AcceleratorRegistry:
        AcceleratorRegistry.register(
            IPUAccelerator.name(), IPUAccelerator, description="Graphcore IPUs, by PopTorch"
        )
