"""Graphcore's SDK, imported when it is needed: the rest of the package works without it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, Optional

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.config import PipelineConfig

INSTEAD = (
    "--trainer.accelerator cpu (or gpu) --trainer.devices {devices} --trainer.strategy "
    "lightning_ipu_bert.PipelineParallelStrategy --trainer.precision 32-true"
)
"""Flags that run a plan without IPUs."""


def import_poptorch(plan: Optional[PipelineConfig] = None) -> Any:
    """Return PopTorch.

    Args:
        plan: What was to be run, for the message.

    Raises:
        UserError: If PopTorch is not there, or belongs to another torch.
    """
    try:
        return import_module("poptorch")
    except (ImportError, AssertionError) as error:  # asserts its one version of torch
        reason = str(error).splitlines()[0]
        instead = INSTEAD.format(devices=plan.world_size if plan else 1)
        raise UserError(
            f"accelerator='ipu' needs PopTorch, which cannot be imported ({reason}). It comes with "
            "Graphcore's Poplar SDK 3.4 (https://docs.graphcore.ai) and torch 2.0.1. "
            f"To run the same plan without IPUs: {instead}"
        ) from error


def import_popdist() -> Optional[ModuleType]:
    """Return PopDist if poprun started this process, else None."""
    try:
        popdist = import_module("popdist")
    except ImportError:
        return None
    return popdist if popdist.isPopdistEnvSet() else None
