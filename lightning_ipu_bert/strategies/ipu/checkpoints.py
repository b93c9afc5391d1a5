"""Checkpoints of runs on IPUs: those of any strategy, with an additional entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_ipu_bert._compat.torch import without_torch_function
from lightning_ipu_bert.checkpoint_file import IPU_KEY
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig
from lightning_ipu_bert.pipeline.ipu.file import save_ipu_config


def plain_state(module: LightningModule) -> Dict[str, object]:
    """Return the state dict of a module as plain tensors, even while PopTorch wraps them."""
    with without_torch_function():
        return {
            name: value.detach().as_subclass(Tensor) if isinstance(value, Tensor) else value
            for name, value in module.state_dict().items()
        }


def add_ipu_entry(
    checkpoint: Dict[str, object], config: IPUConfig, rng_state: Optional[List[int]]
) -> None:
    """Add the IPU config, number of IPUs and random state to a checkpoint."""
    checkpoint[IPU_KEY] = {
        "config": config.to_dict(),
        "num_ipus": config.training.shape.num_devices,
        "rng_state": rng_state,
    }


def save_config_beside(config: IPUConfig, filepath: Any) -> None:
    """Write `ipu_config.json` to the folder of a checkpoint, if it is local."""
    if "://" not in str(filepath):
        save_ipu_config(config, Path(filepath).parent)
