"""Starting the ranks of this machine, after everything that can be checked was checked."""

from __future__ import annotations

from typing import Any, Callable, Optional, Type

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import (
    _MultiProcessingLauncher,
    _SubprocessScriptLauncher,
)
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.pipeline.partition import device_allocation, partition
from lightning_ipu_bert.strategies.checks import check_loaders, check_run


def create_launcher(strategy: Any, start_method: str) -> Any:
    """Return Lightning's launcher for scripts (popen) or notebooks (fork, spawn), with checks.

    Under torchrun, SLURM and so on the processes are there already, and it only checks.
    """
    if start_method == "popen":
        return _checked(_SubprocessScriptLauncher)(
            strategy.cluster_environment, strategy.num_processes, strategy.num_nodes, plan=strategy
        )
    return _checked(_MultiProcessingLauncher)(strategy, start_method=start_method, plan=strategy)


def _checked(launcher: Type[_Launcher]) -> Any:
    class CheckedLauncher(launcher):  # type: ignore[misc,valid-type]
        """Checks a run before it starts it."""

        def __init__(self, *args: Any, plan: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._plan = plan

        def launch(
            self,
            function: Callable[..., Any],
            *args: Any,
            trainer: Optional[Trainer] = None,
            **kwargs: Any,
        ) -> Any:
            if trainer is not None:
                module = args[0] if args and isinstance(args[0], LightningModule) else None
                config: PipelineConfig = self._plan.config
                module = module or getattr(trainer, "lightning_module", None)
                check_run(trainer, module, config)
                check_loaders(args[1] if len(args) > 1 else None, config)
                _show(module, config)
            return super().launch(function, *args, trainer=trainer, **kwargs)

    return CheckedLauncher


def _show(module: Any, config: PipelineConfig) -> None:
    if module is not None:
        stages = partition(list(module.pipeline_blocks()), config.layers_per_stage)
        rank_zero_info(device_allocation(stages, module.block_labels))
    if config.replicated_tensor_sharding and not config.shards_optimizer:
        rank_zero_info(
            "replicated_tensor_sharding is off: replication_factor=1 leaves nobody to share with."
        )
