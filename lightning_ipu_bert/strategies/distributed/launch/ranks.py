"""The ranks of a job: how they are started, numbered and connected, and which plan they follow."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Callable, List, Optional, Union

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_ipu_bert._compat.lightning import default_backend, init_process_group
from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.pipeline.rules import enforce
from lightning_ipu_bert.strategies.distributed.checks import resolve_run
from lightning_ipu_bert.strategies.distributed.launch.launcher import ScriptLauncher
from lightning_ipu_bert.strategies.distributed.launch.notebook import NotebookLauncher
from lightning_ipu_bert.strategies.distributed.mesh import Mesh, create_mesh

Launcher = Union[ScriptLauncher, NotebookLauncher]


class Ranks:
    """Outlives runs: processes, process group and mesh are made once."""

    def __init__(
        self,
        config: PipelineConfig,
        ignored: List[str],
        backend: Optional[str],
        timeout_seconds: float,
        start_method: str,
    ) -> None:
        """Start nothing yet.

        Args:
            config: What the user wrote.
            ignored: Fields that the user wrote and that have no effect on ranks.
            backend: Of torch.distributed; the device's own where None.
            timeout_seconds: How long a rank waits for another.
            start_method: popen, fork or spawn.
        """
        self.config = config
        self.environment: Optional[ClusterEnvironment] = None
        """How processes find each other, once they have."""
        self.mesh: Optional[Mesh] = None
        self._plan: Optional[Plan] = None  # of the run that is about to begin
        self._ignored = ignored
        self._backend = backend
        self._timeout = timedelta(seconds=timeout_seconds)
        self._start_method = start_method
        self._launcher: Optional[Launcher] = None

    @property
    def end_at_once(self) -> Callable[[], None]:
        """What a second Ctrl-C does."""
        assert self._launcher is not None
        return self._launcher.end_at_once

    def launcher(
        self, strategy: ParallelStrategy, num_nodes: int, fail: Callable[[BaseException], None]
    ) -> Optional[Launcher]:
        """Return what starts the ranks of this machine, once the Trainer has chosen devices.

        Args:
            strategy: Has the devices and the cluster environment.
            num_nodes: Machines.
            fail: Is called with what this rank has raised while others have not.
        """
        environment = strategy.cluster_environment
        if self._launcher is None and environment is not None:
            count = len(strategy.parallel_devices or [])
            self._launcher = (
                ScriptLauncher(environment, count, num_nodes, self._prepare, fail)
                if self._start_method == "popen"
                else NotebookLauncher(strategy, self._start_method, self._prepare)
            )
        return self._launcher

    def number(self, strategy: ParallelStrategy, num_nodes: int) -> None:
        """Number the ranks over all machines, and check that they are as many as are needed.

        Raises:
            UserError: If they are not.
        """
        count, environment = len(strategy.parallel_devices or []), strategy.cluster_environment
        if environment is not None:
            environment.set_global_rank(strategy.node_rank * count + strategy.local_rank)
            environment.set_world_size(num_nodes * count)
        rank_zero_only.rank = strategy.global_rank  # type: ignore[attr-defined]
        self.config = self.config.for_devices(count * num_nodes)
        enforce([*self.config.shape_rules(), *self.config.device_rules(count, num_nodes)])

    def join(self, environment: Optional[ClusterEnvironment], device: torch.device) -> None:
        """Connect with the other ranks; the next run uses the same connections."""
        assert environment is not None
        self.environment = environment
        reset_seed()
        backend = self._backend or default_backend(device)
        init_process_group(environment, backend, self._timeout)
        if self.mesh is None:
            shape = self.config.shape
            self.mesh = create_mesh(
                device.type, shape.batches.replication_factor, shape.ranks_per_replica
            )

    def take_plan(self) -> Plan:
        """Hand the plan over to the run that begins."""
        plan, self._plan = self._plan, None
        assert plan is not None
        return plan

    def _prepare(self, trainer: Optional[Trainer], args: Any) -> None:
        """Check a run, resolve its plan and print it, before any process is started."""
        if trainer is None:
            return
        self._plan = resolve_run(trainer, args, self.config)
        if self._ignored:
            rank_zero_info(f"Without effect on ranks: {', '.join(self._ignored)}.")
            self._ignored = []
        for line in self._plan.lines() if self._plan is not None else ():
            rank_zero_info(line)
