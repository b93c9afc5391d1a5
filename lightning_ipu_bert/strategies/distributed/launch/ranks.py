"""The ranks of a job: launcher, process group, mesh, and the plan of the next run."""

from __future__ import annotations

from datetime import timedelta
from typing import Callable, Dict, List, Optional, Union

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_ipu_bert._compat.lightning import default_backend, init_process_group
from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.pipeline.facts import StrategyFacts
from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.pipeline.rules import enforce
from lightning_ipu_bert.pipeline.schedules import SCHEDULES
from lightning_ipu_bert.strategies.distributed.checks import resolve_plan, resolve_run
from lightning_ipu_bert.strategies.distributed.launch.launcher import ScriptLauncher
from lightning_ipu_bert.strategies.distributed.launch.notebook import NotebookLauncher
from lightning_ipu_bert.strategies.distributed.launch.waiting import waiting_announced
from lightning_ipu_bert.strategies.distributed.mesh import Group, Mesh, broadcast, create_mesh
from lightning_ipu_bert.strategies.distributed.step_replicas import StepReplicas
from lightning_ipu_bert.training.random_states import GeneratorStates

Launcher = Union[ScriptLauncher, NotebookLauncher]


class Ranks:
    """State that outlives runs: processes, process group and mesh are created once."""

    def __init__(
        self,
        config: PipelineConfig,
        ignored: List[str],
        backend: Optional[str],
        timeout_seconds: float,
        start_method: str,
    ) -> None:
        """Create the object; no process is started.

        Args:
            config: The configuration.
            ignored: Fields that are set and have no effect on ranks.
            backend: Backend of torch.distributed; None selects the default of the device.
            timeout_seconds: Timeout of communication between ranks.
            start_method: popen, fork or spawn.
        """
        self.config = config
        self.environment: Optional[ClusterEnvironment] = None
        """The cluster environment; None before `join`."""
        self.mesh: Optional[Mesh] = None
        self.loaded_generators: List[GeneratorStates] = []
        """Random states of the replicas in the checkpoint from which the next run resumes."""
        self._plan: Optional[Plan] = None  # of the next run
        self._step_replicas: Optional[StepReplicas] = None
        self._ignored = ignored
        self._backend = backend
        self._timeout = timedelta(seconds=timeout_seconds)
        self._start_method = start_method
        self._launcher: Optional[Launcher] = None

    @property
    def end_at_once(self) -> Callable[[], None]:
        """Called by a second Ctrl-C."""
        assert self._launcher is not None
        return self._launcher.end_at_once

    @property
    def replica_group(self) -> Group:
        """The ranks that hold the same stages, one per replica of a step; None before `join`."""
        return None if self._step_replicas is None else self._step_replicas.group

    @property
    def step_replicas(self) -> StepReplicas:
        """The replicas that run a step."""
        assert self._step_replicas is not None
        return self._step_replicas

    def replicas_or(self, group: Group) -> Group:
        """Return a group of the user, or `replica_group`: `self.all_gather` passes all ranks."""
        return self.replica_group if group in (None, dist.group.WORLD) else group

    @property
    def facts(self) -> StrategyFacts:
        """The facts that models and data depend on."""
        return StrategyFacts(
            micro_batches_per_batch=self.config.batches.gradient_accumulation_steps,
            splits_backward=SCHEDULES[self.config.schedule].splits_backward,
            holds_interrupts=True,
            data_group=self.replica_group,
        )

    def share(self, rank: int) -> Dict[str, object]:
        """Return the share of the data of a rank, the same for all ranks of its replica."""
        replica = rank // self.config.shape.ranks_per_replica
        return {"num_replicas": self.config.replication_factor, "rank": replica}

    def launcher(
        self, strategy: ParallelStrategy, num_nodes: int, fail: Callable[[BaseException], None]
    ) -> Optional[Launcher]:
        """Return the launcher of the ranks on this machine; None before the Trainer sets devices.

        Args:
            strategy: Holds the devices and the cluster environment.
            num_nodes: Number of machines.
            fail: Called with an exception of this rank that other ranks did not raise.
        """
        environment = strategy.cluster_environment
        if self._launcher is None and environment is not None:
            count = len(strategy.parallel_devices or [])
            seconds = self._timeout.total_seconds()
            self._launcher = (
                ScriptLauncher(
                    environment,
                    count,
                    num_nodes,
                    self._prepare,
                    fail,
                    seconds,
                )
                if self._start_method == "popen"
                else NotebookLauncher(strategy, self._start_method, self._prepare)
            )
        return self._launcher

    def number(self, strategy: ParallelStrategy, num_nodes: int) -> None:
        """Set global rank and world size, and check them against the configuration.

        Raises:
            UserError: If the number of ranks does not match the stages and replicas.
        """
        count, environment = len(strategy.parallel_devices or []), strategy.cluster_environment
        if environment is not None:
            environment.set_global_rank(strategy.node_rank * count + strategy.local_rank)
            environment.set_world_size(num_nodes * count)
        rank_zero_only.rank = strategy.global_rank  # type: ignore[attr-defined]
        self.config = self.config.for_devices(count * num_nodes)
        enforce([*self.config.shape_rules(), *self.config.device_rules(count, num_nodes)])

    def join(self, environment: Optional[ClusterEnvironment], device: torch.device) -> None:
        """Initialize process group and mesh, once per job."""
        assert environment is not None
        self.environment = environment
        backend = self._backend or default_backend(device)
        with waiting_announced(environment, self._timeout):
            init_process_group(environment, backend, self._timeout)
        broadcast(GeneratorStates.current()).restore()  # one random state until training starts
        if self.mesh is None:
            shape = self.config.shape
            self.mesh = create_mesh(
                shape.batches.replication_factor, shape.ranks_per_replica, self._timeout
            )
            self._step_replicas = StepReplicas(self.mesh, self._timeout)

    def take_plan(self, trainer: Trainer) -> Plan:
        """Return the plan of the next run, and reset it."""
        plan, self._plan = self._plan, None
        if plan is None:  # the module has just created its blocks
            fitting = trainer.state.fn == TrainerFn.FITTING
            plan = resolve_plan(trainer.lightning_module, self.config, fitting)
            self._print(plan)
        return plan

    def _prepare(self, trainer: Optional[Trainer], args: object) -> None:
        """Check a run, resolve its plan and print it, before any process is started."""
        if trainer is None:
            return
        self._plan = resolve_run(trainer, args, self.config)
        if self._ignored:
            rank_zero_info(f"Ignored without IPUs: {', '.join(self._ignored)}.")
            self._ignored = []
        if self._plan is not None:
            self._print(self._plan)

    def _print(self, plan: Plan) -> None:
        for line in plan.lines():
            rank_zero_info(line)
