"""One process of a run on IPUs, as Lightning sees it: its devices, its place among others."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightning_ipu_bert.strategies.ipu.accelerator import IPUAccelerator
from lightning_ipu_bert.strategies.ipu.precision import IPUPrecision, for_ipu
from lightning_ipu_bert.strategies.ipu.sdk import import_popdist


class IPUProcess(ParallelStrategy):
    """Owns all IPUs that its replicas need. There are several only where poprun starts them."""

    num_ipus: int
    """IPUs that training needs."""

    @property
    def accelerator(self) -> Optional[Accelerator]:
        """Always the IPUs."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Optional[Accelerator]) -> None:
        # With accelerator="auto" Lightning chooses one that it knows.
        self._accelerator = (
            accelerator
            if isinstance(accelerator, IPUAccelerator)
            else (IPUAccelerator() if accelerator is not None else None)
        )

    @property
    def parallel_devices(self) -> Optional[List[torch.device]]:
        """The IPUs: as many as `devices` says, or as the plan needs."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: Optional[List[torch.device]]) -> None:
        count = self.num_ipus
        if devices and devices[0].type == "ipu" and devices[-1].index is not None:
            count = devices[-1].index + 1
        self._parallel_devices = [torch.device("ipu", i) for i in range(count)] if devices else None

    @property
    def precision_plugin(self) -> Precision:
        """How numbers are represented."""
        return self._precision_plugin if self._precision_plugin is not None else IPUPrecision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Optional[Precision]) -> None:
        self._precision_plugin = for_ipu(plugin)

    @property
    def root_device(self) -> torch.device:
        """The host: batches, metrics and the weights between runs are there."""
        return torch.device("cpu")

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning shares the data among processes: for training, if there are several.

        Each of them evaluates everything, and so has whole metrics and predictions.
        """
        trainer = getattr(self.lightning_module, "_trainer", None)
        return self._processes[1] > 1 and trainer is not None and bool(trainer.training)

    @property
    def global_rank(self) -> int:
        """This process, of those that poprun started."""
        return self._processes[0]

    @property
    def local_rank(self) -> int:
        """0: data are prepared by each process."""
        return 0

    @property
    def node_rank(self) -> int:
        """0."""
        return 0

    @property
    def world_size(self) -> int:
        """Processes that poprun started."""
        return self._processes[1]

    @property
    def _processes(self) -> Tuple[int, int]:
        popdist: Any = import_popdist()
        return (popdist.getInstanceIndex(), popdist.getNumInstances()) if popdist else (0, 1)

    @property
    def distributed_sampler_kwargs(self) -> Dict[str, Any]:
        """Data are shared by processes; replicas of one process take parts of its batches."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def set_world_ranks(self) -> None:
        """Let only the first process print and save."""
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the value: every process evaluates everything."""
        return tensor

    def all_gather(
        self, tensor: Tensor, group: Optional[Any] = None, sync_grads: bool = False
    ) -> Tensor:
        """Return the value."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return the decision."""
        return decision

    def barrier(self, name: Optional[str] = None) -> None:
        """Do nothing: PopDist keeps processes together while they run."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object."""
        return obj
