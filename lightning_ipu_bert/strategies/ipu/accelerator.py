"""`IPUAccelerator`: `Trainer(accelerator="ipu")`."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Union

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from typing_extensions import override

from lightning_ipu_bert.errors import UserError

ONLY_OURS = (
    "accelerator='ipu' works with IPUStrategy, and strategy={strategy} was chosen. Give "
    "--trainer.strategy ipu_pipeline, or class_path: lightning_ipu_bert.IPUStrategy."
)


class IPUAccelerator(Accelerator):
    """Graphcore's IPUs. One process owns all that its replicas need."""

    @override
    def setup_device(self, device: torch.device) -> None:
        """Refuse other strategies, which would quietly run on the CPU.

        Raises:
            UserError: Always: `IPUStrategy` does not call it.
        """
        raise UserError(ONLY_OURS.format(strategy="another one"))

    @override
    def setup(self, trainer: Trainer) -> None:
        """Refuse other strategies.

        Raises:
            UserError: Always: `IPUStrategy` does not call it.
        """
        raise UserError(ONLY_OURS.format(strategy=type(trainer.strategy).__name__))

    @override
    def get_device_stats(self, device: Union[torch.device, str, int]) -> Dict[str, Any]:
        """Return nothing: PopTorch measures no use of memory or time while it runs."""
        return {}

    @override
    def teardown(self) -> None:
        """Do nothing: the strategy gives its IPUs back."""

    @staticmethod
    @override
    def parse_devices(devices: Union[int, str, List[int]]) -> int:
        """Return the number of IPUs; 0 stands for as many as the plan needs.

        Raises:
            UserError: If it is no number.
        """
        count = len(devices) if isinstance(devices, (list, tuple)) else devices
        try:
            number = 0 if count in ("auto", -1, "-1") else int(count)
        except ValueError:
            number = -1
        if number < 0:
            raise UserError(
                f"devices={devices!r} is no number of IPUs. Leave it out for as many as the "
                "stages and replicas need, or give their product."
            )
        return number

    @staticmethod
    @override
    def get_parallel_devices(devices: int) -> List[torch.device]:
        """Return the last of the IPUs, from which `IPUStrategy` knows the others.

        One device only: of a strategy that is refused later, Lightning must not start processes.
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
        """Return True: what is missing, `IPUStrategy` says itself, and what to do about it.

        Graphs can be compiled without IPUs, too (compile_only).
        """
        return True

    @staticmethod
    @override
    def name() -> str:
        """Return the name for `Trainer(accelerator=...)`."""
        return "ipu"


def expand(devices: Optional[List[torch.device]], needed: int) -> Optional[List[torch.device]]:
    """Return all IPUs for the one that `get_parallel_devices` has named.

    Args:
        devices: What the Trainer has chosen: the last IPU, all of them, or devices of another kind.
        needed: How many the plan needs, where the Trainer was not told a number.
    """
    if not devices:
        return None
    named = devices[-1].index if devices[0].type == "ipu" else None
    return [torch.device("ipu", i) for i in range(needed if named is None else named + 1)]
