"""The optimizer's parameter groups and the learning rate's schedule."""

from __future__ import annotations

from typing import Any, Dict, List

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from lightning_ipu_bert.training.settings import LR_SCHEDULES


def decay_groups(module: nn.Module, weight_decay: float) -> List[Dict[str, Any]]:
    """Split the trained parameters into those that decay and those that do not.

    Biases and the LayerNorms' weights, the parameters with one dimension, do not decay.

    Source:
        Devlin et al., BERT's optimization.py (exclude_from_weight_decay).
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def warmup_steps(total_steps: int, ratio: float, steps: int) -> int:
    """Return the updates of the warm-up: `steps` where it is set, else a share of all updates."""
    return steps or round(total_steps * ratio)


def learning_rate_schedule(
    optimizer: Optimizer, name: str, num_warmup_steps: int, total_steps: int
) -> LambdaLR:
    """Return a schedule that rises from 0 in the warm-up and then falls to 0, or stays.

    Args:
        optimizer: Its learning rate is the highest one.
        name: One of `settings.LR_SCHEDULES`.
        num_warmup_steps: Updates until the highest rate.
        total_steps: Updates of the whole run, at whose end linear and cosine reach 0.
    """
    schedule: LambdaLR = get_scheduler(LR_SCHEDULES[name], optimizer, num_warmup_steps, total_steps)
    return schedule
