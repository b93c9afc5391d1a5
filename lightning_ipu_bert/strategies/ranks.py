"""Ranks of a pipeline: how many, which stages and data each has, how they meet."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Dict, List, Literal, Optional, Union

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.strategies import watch
from lightning_ipu_bert.strategies.checks import check_devices
from lightning_ipu_bert.strategies.launcher import NotebookLauncher, ScriptLauncher
from lightning_ipu_bert.strategies.signals import SignalsBetweenSteps


class PipelineRanks(SignalsBetweenSteps):
    """A strategy of replicas, each of which spreads over several ranks.

    rank = replica x ranks per replica + position. The ranks of a replica read the same data.
    """

    _failed = False

    def __init__(
        self,
        accelerator: Optional[Accelerator] = None,
        parallel_devices: Optional[List[torch.device]] = None,
        cluster_environment: Optional[ClusterEnvironment] = None,
        checkpoint_io: Optional[CheckpointIO] = None,
        precision_plugin: Optional[Precision] = None,
        process_group_backend: Optional[str] = None,
        timeout_seconds: float = 1800.0,
        start_method: Literal["popen", "fork", "spawn"] = "popen",
        ipu_config: Union[str, Dict[str, Any], None] = None,
        pod_type: Optional[str] = None,
        loss_scaling: Optional[float] = None,
        **plan: Any,
    ) -> None:
        """Create the strategy.

        Args:
            accelerator: Set by the Trainer, as the next four.
            parallel_devices: Devices of this machine.
            cluster_environment: How processes find each other.
            checkpoint_io: How checkpoints are written.
            precision_plugin: How numbers are represented.
            process_group_backend: Backend of torch.distributed; gloo on CPUs, NCCL on GPUs.
            timeout_seconds: How long a rank waits for another before it gives up.
            start_method: How ranks of this machine are started; fork in notebooks.
            ipu_config: Only for `IPUStrategy`, as the next two: without effect here, so that a
                config can be moved by its class_path.
            pod_type: Type of pod.
            loss_scaling: Factor of the loss.
            **plan: Fields of `PipelineConfig`. Without layers_per_stage the layers are shared by
                all devices, and gradient_accumulation_steps is at least their number.

        Raises:
            UserError: If the plan breaks a rule.
        """
        super().__init__(
            accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin
        )
        self._plan = plan
        self._config = PipelineConfig(**plan) if "layers_per_stage" in plan else None
        self.num_nodes = 1
        self.process_group_backend = process_group_backend
        self._timeout = timedelta(seconds=timeout_seconds)
        self._start_method = start_method
        self._pipeline_group: Any = None
        self._replica_group: Any = None

    @property
    def config(self) -> PipelineConfig:
        """The plan."""
        if self._config is None:
            stages = max(1, self.num_processes * self.num_nodes)
            steps = {"gradient_accumulation_steps": stages, **self._plan}
            self._config = PipelineConfig([-1] * stages, **steps)
        return self._config

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches in a batch of a loader."""
        return self.config.gradient_accumulation_steps

    @property
    def is_distributed(self) -> bool:
        """Lightning gives loaders a distributed sampler only to strategies that say so."""
        return True

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Ranks on this machine."""
        return len(self.parallel_devices or [])

    @property
    def replica(self) -> int:
        """Which replica this rank belongs to."""
        return self.global_rank // self.config.ranks_per_replica

    @property
    def position(self) -> int:
        """Where in its replica this rank stands; 0 holds the first stage."""
        return self.global_rank % self.config.ranks_per_replica

    @property
    def distributed_sampler_kwargs(self) -> Dict[str, Any]:
        """Data are shared by replicas; the ranks of a replica read the same."""
        return {"num_replicas": self.config.replication_factor, "rank": self.replica}

    def set_world_ranks(self) -> None:
        """Number the ranks over all machines."""
        if self.cluster_environment is not None:
            rank = self.node_rank * self.num_processes + self.local_rank
            self.cluster_environment.set_global_rank(rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        check_devices(self.config, self.num_processes, self.num_nodes)
        if self._start_method == "popen":
            self._launcher = ScriptLauncher(self)
        else:
            self._launcher = NotebookLauncher(self, start_method=self._start_method)

    def fail(self, exception: BaseException) -> None:
        """Note that the job has failed, and say so if it was here: other ranks may be gone."""
        self._failed = True
        if not isinstance(exception, (UserError, SystemExit)):
            step = getattr(getattr(self.lightning_module, "_trainer", None), "global_step", 0)
            stages = ", ".join(map(str, self.config.stages_of(self.position)))
            watch.report(self.global_rank, f"in step {step} (stage {stages})", exception)

    def setup_environment(self) -> None:
        """Join the other ranks."""
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        device = self.root_device
        backend = self.process_group_backend or _get_default_process_group_backend_for_device(
            device
        )
        self.process_group_backend = backend
        assert self.cluster_environment is not None
        _init_dist_connection(self.cluster_environment, backend, timeout=self._timeout)
        if self._pipeline_group is None:  # the next fit or validate uses the same
            self._create_groups()

    def _create_groups(self) -> None:
        ranks, replicas = self.config.ranks_per_replica, self.config.replication_factor
        for replica in range(replicas):
            group = dist.new_group(list(range(replica * ranks, (replica + 1) * ranks)))
            self._pipeline_group = group if replica == self.replica else self._pipeline_group
        for position in range(ranks):
            group = dist.new_group(list(range(position, replicas * ranks, ranks)))
            self._replica_group = group if position == self.position else self._replica_group

    # --- collectives ------------------------------------------------------------------------------

    def barrier(self, name: Optional[str] = None) -> None:
        """Wait for all ranks."""
        if dist.is_initialized():
            dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object of rank `src`."""
        if not dist.is_initialized():
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def reduce(
        self, tensor: Any, group: Optional[Any] = None, reduce_op: Optional[Any] = "mean"
    ) -> Any:
        """Combine the values of replicas; the ranks of a replica have the same.

        A mean of counts is not cut to a whole number, as by Lightning's function: replicas may have
        evaluated different numbers of examples.
        """
        group = group or self._replica_group
        if not isinstance(tensor, Tensor) or group is None:
            return tensor
        name = str(reduce_op).rpartition(".")[2].upper()  # "mean", ReduceOp.SUM, ...
        mean = name in ("MEAN", "AVG")
        operation = getattr(dist.ReduceOp, "SUM" if mean else name)
        result = tensor.float() if mean and not tensor.is_floating_point() else tensor.clone()
        dist.all_reduce(result, operation, group=group)
        return result / dist.get_world_size(group) if mean else result

    def all_gather(
        self, tensor: Tensor, group: Optional[Any] = None, sync_grads: bool = False
    ) -> Tensor:
        """Return the values of all replicas; the ranks of a replica have the same."""
        return super().all_gather(tensor, group or self._replica_group, sync_grads)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all ranks, or any, decided so."""
        votes = torch.tensor(int(decision), device=self.root_device)
        if dist.is_initialized():
            dist.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)
