"""Strategies: who runs the stages, and how Lightning sees it."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_ipu_bert.strategies.pipeline_parallel import PipelineParallelStrategy

__all__ = ["PipelineParallelStrategy", "register_strategies"]


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
