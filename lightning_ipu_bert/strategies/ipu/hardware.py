"""What programs run on: enough IPUs of a kind that they are made for, and poprun's replicas."""

from __future__ import annotations

import os
from typing import Any

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig
from lightning_ipu_bert.strategies.ipu.sdk import import_popdist, import_poptorch

VERSIONS = {2: "Mk2", 21: "C600"}
"""By `poptorch.ipuHardwareVersion`."""
SIMULATIONS = ("POPTORCH_IPU_MODEL", "POPTORCH_SMALL_IPU_MODEL")
"""With one of these variables PopTorch runs on the CPU, and says that there are no IPUs."""


def check_hardware(ipus: int) -> None:
    """Check that there are IPUs to run on.

    Args:
        ipus: How many the largest program needs.

    Raises:
        UserError: If there are too few, or of a kind that programs are not made for.
    """
    if any(os.environ.get(name, "0") not in ("", "0") for name in SIMULATIONS):
        return
    poptorch: Any = import_poptorch()
    if not poptorch.ipuHardwareIsAvailable():
        raise UserError(
            "There are no IPUs on this machine (`gc-info -l` lists them). Set POPTORCH_IPU_MODEL=1 "
            "to try a small program on a simulation, or compile_only to compile for later."
        )
    version = poptorch.ipuHardwareVersion()
    if version not in VERSIONS:
        known = " or ".join(f"{number} ({name})" for number, name in VERSIONS.items())
        raise UserError(
            f"The IPUs of this machine are of version {version}, and programs need {known}. Use "
            "a machine that has them."
        )
    if not poptorch.ipuHardwareIsAvailable(1 << (ipus - 1).bit_length()):
        raise UserError(
            f"The plan needs {ipus} IPUs, and this machine does not have so many together "
            "(`gc-info -l` lists them). Use fewer stages or replicas, or a larger partition."
        )


def check_poprun(config: IPUConfig) -> None:
    """Check that poprun's processes hold the replicas of the plan, and begin with the same weights.

    Raises:
        UserError: If they do not.
    """
    popdist: Any = import_popdist()
    if popdist is None:
        return
    replicas = popdist.getNumLocalReplicas()
    for name in ("replication_factor", "inference_replication_factor"):
        if vars(config)[name] != replicas:
            raise UserError(
                f"{name}={vars(config)[name]}, and poprun gives each process {replicas} "
                f"replicas. Set it to {replicas}, or give poprun other --num-replicas or "
                "--num-instances."
            )
    if popdist.getNumInstances() > 1 and not os.environ.get("PL_GLOBAL_SEED"):
        raise UserError(
            f"poprun has started {popdist.getNumInstances()} processes, and without a seed each "
            "begins with weights of its own. Set seed_everything."
        )
