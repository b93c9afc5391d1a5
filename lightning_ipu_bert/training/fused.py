"""Fused steps of Adam and AdamW on CPUs: one pass over parameters, gradients and state."""

from __future__ import annotations

from typing import Any, Dict, List

import torch
from torch.optim import Optimizer

from lightning_ipu_bert._compat.torch import HAS_CPU_KERNELS
from lightning_ipu_bert.training.update_hooks import around_update

FLAGS = ("fused", "foreach")


def use_fused_steps(optimizer: Optimizer) -> None:
    """Let an optimizer step fused where its parameters are on the CPU.

    The flag ``fused`` is only set during the update. As an argument of the optimizer it would end
    up in checkpoints, which then fail where it is not supported; it is refused with parameters on
    the meta device (other stages of a pipeline); and Lightning does not clip gradients with it.

    Args:
        optimizer: An Adam or AdamW of torch; others are left alone.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or not HAS_CPU_KERNELS:
        return
    kept: List[Dict[str, Any]] = []

    def fuse() -> None:
        kept[:] = [{flag: group[flag] for flag in FLAGS} for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            if can_fuse(group):
                group.update(fused=True, foreach=False)

    def restore() -> None:
        for group, flags in zip(optimizer.param_groups, kept):
            group.update(flags)

    around_update(optimizer, fuse, restore)


def can_fuse(group: Dict[str, Any]) -> bool:
    """Return whether torch has a fused step for the parameters of a group.

    Those on the meta device have no gradients, and are not updated.
    """
    return not group["differentiable"] and all(
        p.device.type in ("cpu", "meta") and p.is_floating_point() for p in group["params"]
    )
