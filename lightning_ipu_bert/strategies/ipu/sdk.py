"""Lazy imports of the Poplar SDK: the rest of the package works without it."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any, Optional

from lightning_ipu_bert.errors import UserError

INSTEAD = (
    "--trainer.accelerator cpu --trainer.precision 32-true --trainer.strategy.class_path "
    "lightning_ipu_bert.PipelineParallelStrategy {flags} (on GPUs: --trainer.accelerator gpu "
    "--trainer.precision bf16-mixed)"
)
"""Flags that run the same plan without IPUs."""


def import_poptorch(flags: str = "--trainer.devices N") -> Any:
    """Return PopTorch.

    Args:
        flags: Additional flags to run the plan without IPUs, for the message.

    Raises:
        UserError: If PopTorch is not installed, or is built for another version of torch.
    """
    try:
        return import_module("poptorch")
    except (ImportError, AssertionError) as error:  # asserts its one version of torch
        reason = str(error).splitlines()[0]
        raise UserError(
            f"accelerator='ipu' needs PopTorch, which cannot be imported ({reason}). It comes with "
            "Graphcore's Poplar SDK 3.4 (https://docs.graphcore.ai) and torch 2.0.1. "
            f"To run the same plan without IPUs: {INSTEAD.format(flags=flags)}"
        ) from error


def import_popdist() -> Optional[ModuleType]:
    """Return PopDist if poprun started this process, else None."""
    try:
        popdist = import_module("popdist")
    except ImportError:
        return None
    if not popdist.isPopdistEnvSet():
        return None
    _begin(popdist)
    return popdist


@lru_cache(maxsize=None)
def _begin(popdist: Any) -> None:
    """Initialize PopDist, once and before anything else."""
    popdist.init()
