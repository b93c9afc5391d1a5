"""Checks of the hardware: number and version of IPUs, and the replicas of poprun."""

from __future__ import annotations

import os

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig
from lightning_ipu_bert.strategies.ipu.sdk import import_popdist, import_poptorch

VERSIONS = {2: "Mk2", 21: "C600"}
"""`poptorch.ipuHardwareVersion`: name."""
SIMULATIONS = ("POPTORCH_IPU_MODEL", "POPTORCH_SMALL_IPU_MODEL")
"""Environment variables with which PopTorch runs on the CPU and reports no IPUs."""


def check_hardware(ipus: int) -> None:
    """Check that enough IPUs of a supported version are available.

    Args:
        ipus: Number of IPUs of the largest program.

    Raises:
        UserError: If there are not.
    """
    if any(os.environ.get(name, "0") not in ("", "0") for name in SIMULATIONS):
        return
    poptorch = import_poptorch()
    if not poptorch.ipuHardwareIsAvailable():
        raise UserError(
            "No IPUs are available on this machine (`gc-info -l` lists them). Set "
            "POPTORCH_IPU_MODEL=1 to simulate a small program, or compile_only to compile only."
        )
    version = poptorch.ipuHardwareVersion()
    if version not in VERSIONS:
        known = " or ".join(f"{number} ({name})" for number, name in VERSIONS.items())
        raise UserError(
            f"The IPUs on this machine have version {version}, but programs need {known}. Use "
            "another machine."
        )
    if not poptorch.ipuHardwareIsAvailable(1 << (ipus - 1).bit_length()):
        raise UserError(
            f"The plan needs {ipus} IPUs, but this machine has no such group of IPUs (`gc-info -l` "
            "lists them). Use fewer stages or replicas, or a larger partition."
        )


def check_poprun(config: IPUConfig, weighted: bool) -> None:
    """Check the replicas per process of poprun, and that processes start with the same weights.

    Args:
        config: The configuration.
        weighted: Whether the module weights its losses.

    Raises:
        UserError: If they do not.
    """
    popdist = import_popdist()
    if popdist is None:
        return
    replicas = popdist.getNumLocalReplicas()
    for name in ("replication_factor", "inference_replication_factor"):
        if vars(config)[name] != replicas:
            raise UserError(
                f"{name}={vars(config)[name]} must be {replicas}, the replicas per process of "
                f"poprun. Set it to {replicas}, or change --num-replicas or --num-instances."
            )
    if popdist.getNumInstances() > 1 and not os.environ.get("PL_GLOBAL_SEED"):
        raise UserError(
            f"poprun has started {popdist.getNumInstances()} processes, which without a seed start "
            "with different weights. Set seed_everything."
        )
    if popdist.getNumInstances() > 1 and weighted:
        raise UserError(
            f"poprun has started {popdist.getNumInstances()} processes, which cannot weight losses "
            "by batch_weight: none knows the total of all. Use --num-instances 1."
        )
