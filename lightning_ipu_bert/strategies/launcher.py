"""Starting the ranks of this machine, after everything that can be checked was checked."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Any, Callable, Optional

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import (
    _MultiProcessingLauncher,
    _SubprocessScriptLauncher,
)
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.pipeline.partition import device_allocation, partition
from lightning_ipu_bert.strategies import watch
from lightning_ipu_bert.strategies.checks import check_loaders, check_run, check_torch


class ScriptLauncher(_SubprocessScriptLauncher):
    """Starts the script anew for every other rank of this machine.

    Under torchrun, SLURM and so on the processes are there already, and it only checks.
    """

    def __init__(self, strategy: Any) -> None:
        """Create a launcher for a strategy."""
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self._strategy = strategy

    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,
        trainer: Optional[Trainer] = None,
        **kwargs: Any,
    ) -> Any:
        """Check the run, start the ranks, and call the function."""
        check_and_show(self._strategy.config, trainer, args)
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        watched = False
        if not environment.creates_processes_externally:
            os.environ[watch.PARENT] = str(os.getpid())
            self._call_children_scripts()
            watch.watch_children(self.procs)
        else:
            watched = watch.watch_launcher()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        watch.running.set()
        try:
            return function(*args, **kwargs)
        except (KeyboardInterrupt, SIGTERMException):
            raise  # all ranks end in good order
        except BaseException as exception:
            self._strategy.fail(exception)
            watch.kill(self.procs)
            if watched:
                _leave(exception)
            raise
        finally:
            watch.running.clear()

    def kill(self, signum: Any) -> None:
        """Send a signal to the ranks that this one started."""
        if signum == signal.SIGKILL:
            watch.kill(self.procs)
        super().kill(signum)


def _leave(exception: BaseException) -> None:
    """End a rank whose launcher must know that it has said why."""
    if isinstance(exception, UserError):
        print(f"error: {exception}", file=sys.stderr, flush=True)
        os._exit(watch.TOLD_USER_ERROR)
    traceback.print_exception(type(exception), exception, exception.__traceback__)
    os._exit(watch.TOLD)


class NotebookLauncher(_MultiProcessingLauncher):
    """Forks (or spawns) the ranks from a notebook, where there is no script to start anew."""

    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,
        trainer: Optional[Trainer] = None,
        **kwargs: Any,
    ) -> Any:
        """Check the run, start the ranks, and call the function in them."""
        strategy: Any = self._strategy
        check_and_show(strategy.config, trainer, args)
        return super().launch(function, *args, trainer=trainer, **kwargs)


def check_and_show(config: PipelineConfig, trainer: Optional[Trainer], args: Any) -> None:
    """Check what can be checked without processes, and show where the blocks will lie."""
    if trainer is None:
        return
    module: Any = args[0] if args and isinstance(args[0], LightningModule) else None
    module = module or getattr(trainer, "lightning_module", None)
    check_run(trainer, module, config)
    check_loaders(args[1] if len(args) > 1 else None, config)
    check_torch()
    if module is not None:
        stages = partition(list(module.pipeline_blocks()), config.layers_per_stage)
        rank_zero_info(device_allocation(stages, module.block_labels))
    if config.replicated_tensor_sharding and not config.shards_optimizer:
        rank_zero_info(
            "replicated_tensor_sharding is off: replication_factor=1 leaves nobody to share with."
        )
