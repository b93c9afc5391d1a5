"""Parameter groups of the optimizer and the learning rate schedule."""

from __future__ import annotations

from typing import Any, Dict, List

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_ipu_bert.training.settings import LR_SCHEDULES


def decay_groups(module: nn.Module, weight_decay: float) -> List[Dict[str, object]]:
    """Return two parameter groups of the trained parameters: with and without weight decay.

    Biases and LayerNorm weights, the parameters with one dimension, have no weight decay.

    Source:
        Devlin et al., BERT's optimization.py (exclude_from_weight_decay).
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def adamw(module: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW with the groups of `decay_groups`."""
    groups: Any = decay_groups(module, weight_decay)
    # foreach also on CPUs: small models have more overhead than arithmetic.
    return torch.optim.AdamW(groups, lr=learning_rate, foreach=True)


def warmup_steps(total_steps: int, ratio: float, steps: int) -> int:
    """Return the number of warm-up steps: `steps` if it is set, otherwise a ratio of all steps."""
    return steps or round(total_steps * ratio)


def learning_rate_schedule(
    optimizer: Optimizer, name: str, num_warmup_steps: int, total_steps: int
) -> LambdaLR:
    """Return a schedule that increases from 0 during warm-up, then decreases to 0 or is constant.

    Args:
        optimizer: Its learning rate is the peak of the schedule.
        name: One of `settings.LR_SCHEDULES`.
        num_warmup_steps: Number of warm-up steps.
        total_steps: Number of steps of the run, after which linear and cosine reach 0.
    """
    from transformers import get_scheduler  # imports the Trainer

    schedule: LambdaLR = get_scheduler(LR_SCHEDULES[name], optimizer, num_warmup_steps, total_steps)
    return schedule


def scheduled(
    optimizer: Optimizer, total_steps: int, name: str, warmup_ratio: float, num_warmup_steps: int
) -> Dict[str, object]:
    """Return Lightning's configuration of an optimizer with a schedule that steps every update.

    Args:
        optimizer: Its learning rate is the peak of the schedule.
        total_steps: Number of steps of the run.
        name: One of `settings.LR_SCHEDULES`.
        warmup_ratio: See `warmup_steps`.
        num_warmup_steps: See `warmup_steps`.
    """
    warmup = warmup_steps(total_steps, warmup_ratio, num_warmup_steps)
    schedule = learning_rate_schedule(optimizer, name, warmup, total_steps)
    config = {"scheduler": schedule, "interval": "step", "name": "lr-AdamW"}
    return {"optimizer": optimizer, "lr_scheduler": config}
