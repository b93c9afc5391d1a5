"""Cluster environment of runs on IPUs: one process, or several started by poprun."""

from __future__ import annotations

from typing import Tuple

from lightning.fabric.plugins import ClusterEnvironment
from typing_extensions import override

from lightning_ipu_bert.strategies.ipu.sdk import import_popdist


class PoprunEnvironment(ClusterEnvironment):
    """One process, or the processes started by poprun, which are connected by PopDist."""

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    @override
    def main_port(self) -> int:
        return 0

    @staticmethod
    @override
    def detect() -> bool:
        return import_popdist() is not None

    @override
    def world_size(self) -> int:
        return self._processes[1]

    @override
    def set_world_size(self, size: int) -> None:
        """Do nothing: set by poprun."""

    @override
    def global_rank(self) -> int:
        return self._processes[0]

    @override
    def set_global_rank(self, rank: int) -> None:
        """Do nothing: set by poprun."""

    @override
    def local_rank(self) -> int:
        return 0  # data is prepared by each process

    @override
    def node_rank(self) -> int:
        return 0

    @property
    def _processes(self) -> Tuple[int, int]:
        popdist = import_popdist()
        return (popdist.getInstanceIndex(), popdist.getNumInstances()) if popdist else (0, 1)
