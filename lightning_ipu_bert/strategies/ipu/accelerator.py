"""`IPUAccelerator`: `Trainer(accelerator="ipu")`."""

from __future__ import annotations

from typing import Dict, List, Optional, Union

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from typing_extensions import override

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.ipu.program import MAX_IPUS

ONLY_OURS = (
    "accelerator='ipu' requires IPUStrategy, but strategy={strategy} is set. Use "
    "--trainer.strategy ipu_pipeline, or class_path: lightning_ipu_bert.IPUStrategy."
)


class IPUAccelerator(Accelerator):
    """Graphcore IPUs. One process owns the IPUs of all its replicas."""

    @override
    def setup_device(self, device: torch.device) -> None:
        """Reject other strategies, which would silently run on the CPU.

        Raises:
            UserError: Always; `IPUStrategy` does not call this method.
        """
        raise UserError(ONLY_OURS.format(strategy="a different one"))

    @override
    def setup(self, trainer: Trainer) -> None:
        """Reject other strategies.

        Raises:
            UserError: Always; `IPUStrategy` does not call this method.
        """
        raise UserError(ONLY_OURS.format(strategy=type(trainer.strategy).__name__))

    @override
    def get_device_stats(self, device: Union[torch.device, str, int]) -> Dict[str, object]:
        """Return {}: PopTorch has no runtime statistics of devices."""
        return {}

    @override
    def teardown(self) -> None:
        """Do nothing: the strategy releases its IPUs."""

    @staticmethod
    @override
    def parse_devices(devices: Union[int, str, List[int]]) -> int:
        """Return the number of IPUs, or 0 for as many as the plan needs.

        Raises:
            UserError: If `devices` is not a number.
        """
        count = len(devices) if isinstance(devices, (list, tuple)) else devices
        try:
            number = 0 if count in ("auto", -1, "-1") else int(count)
        except ValueError:
            number = -1
        if not 0 <= number <= MAX_IPUS:
            raise UserError(
                f"devices={devices!r} must be a number of IPUs, at most {MAX_IPUS} for a process. "
                "Remove it to use as many as needed, or set it to stages x replicas."
            )
        return number

    @staticmethod
    @override
    def get_parallel_devices(devices: int) -> List[torch.device]:
        """Return the last IPU, from which `IPUStrategy` derives the others.

        A single device, so that Lightning does not start processes before an error is raised.
        """
        return [torch.device("ipu", devices - 1) if devices else torch.device("ipu")]

    @staticmethod
    @override
    def auto_device_count() -> int:
        """Return 0: as many as the plan needs."""
        return 0

    @staticmethod
    @override
    def is_available() -> bool:
        """Return True: `IPUStrategy` raises its own error if PopTorch or IPUs are missing.

        Programs can also be compiled without IPUs (compile_only).
        """
        return True

    @staticmethod
    @override
    def name() -> str:
        """Return the name for `Trainer(accelerator=...)`."""
        return "ipu"


def expand(devices: Optional[List[torch.device]], needed: int) -> Optional[List[torch.device]]:
    """Return all IPUs, given the last one from `get_parallel_devices`.

    Args:
        devices: Devices set by the Trainer: the last IPU, all IPUs, or devices of another type.
        needed: Number of IPUs of the plan, used if the Trainer was given no number.
    """
    if not devices:
        return None
    last = devices[-1].index if devices[0].type == "ipu" else None
    return [torch.device("ipu", i) for i in range(needed if last is None else last + 1)]
