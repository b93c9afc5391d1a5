"""The loss of a training step: what of it the IPUs computed, and what they cannot follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig


def mean_loss(result: Tensor, config: IPUConfig) -> Tensor:
    """Return the mean over what a training call returns.

    Args:
        result: Losses by `config.output_mode`: sums over a replica's micro-batches, [R]; all of
            them, [D x A x R]; or the last one of each replica, [R].
        config: Says how many there are.
    """
    total = result.detach().float()
    if config.output_mode == "sum":
        return total.mean() / (config.device_iterations * config.gradient_accumulation_steps)
    return total.mean()


def refuse_factor(incoming: Tensor) -> None:
    """Refuse a loss that was scaled after `run_loss`: the weights have changed by then."""
    if float(incoming) != 1.0:
        raise UserError(
            f"The loss was multiplied by {float(incoming):g} after run_loss, and on IPUs the "
            "update is done by then. Scale it in pipeline_loss."
        )


def refuse_other_losses(loss: Tensor) -> None:
    """Refuse a loss that has parts which the IPUs did not compute: nobody would follow them.

    Raises:
        UserError: If it depends on a parameter on the host.
    """
    todo, seen = [loss.grad_fn], set()
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # Of all nodes only those that accumulate gradients have a variable.
        if isinstance(getattr(node, "variable", None), torch.nn.Parameter):
            raise UserError(
                "The loss of training_step has a part that run_loss did not compute, and its "
                "gradients would not reach the IPUs. Put it into pipeline_loss."
            )
        todo += [child for child, _ in node.next_functions]
