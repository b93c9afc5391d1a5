"""Atomic writes of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lightning_ipu_bert.files import written_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file in the same folder and renames it.

    Lightning's own plugin copies from a temporary folder that may be on another disk: a process
    that is killed during the copy corrupts the previous checkpoint of that name.
    """

    @override
    def save_checkpoint(
        self, checkpoint: Dict[str, object], path: Any, storage_options: Optional[object] = None
    ) -> None:
        """Write a checkpoint; object stores like s3:// are atomic and left to Lightning."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with written_atomically(Path(path)) as partial:
            torch.save(checkpoint, partial)


def write_atomically(trainer: Trainer) -> None:
    """Write checkpoints of a Trainer atomically, unless it has a plugin of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
