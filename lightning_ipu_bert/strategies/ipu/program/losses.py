"""The loss of a training step, and checks that its gradients are computed on the IPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig


def mean_loss(result: Tensor, output_mode: str, config: IPUConfig) -> Tensor:
    """Return the mean of the losses that a training call returns.

    Args:
        result: Losses by `output_mode`: sums over the micro-batches of a replica, [R]; one
            per micro-batch, [D x A x R]; or the last one of each replica, [R].
        output_mode: What the program returns of every micro-batch.
        config: The configuration.
    """
    total = result.detach().float()
    if output_mode == "sum":
        return total.mean() / (config.device_iterations * config.gradient_accumulation_steps)
    return total.mean()


def refuse_factor(incoming: Tensor) -> None:
    """Raise an error if the loss was scaled after `run_loss`, which updates the weights."""
    if float(incoming) != 1.0:
        raise UserError(
            f"The loss was multiplied by {float(incoming):g} after run_loss, but on IPUs run_loss "
            "updates the weights. Scale it in pipeline_loss."
        )


def refuse_other_losses(loss: Tensor) -> None:
    """Raise an error if the loss has parts whose gradients are not computed on the IPUs.

    Raises:
        UserError: If it depends on a parameter on the host.
    """
    todo, seen = [loss.grad_fn], set()
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # Only nodes that accumulate gradients have a variable.
        if isinstance(getattr(node, "variable", None), torch.nn.Parameter):
            raise UserError(
                "The loss of training_step has a part that is not computed by run_loss, whose "
                "gradients would not reach the IPUs. Compute it in pipeline_loss."
            )
        todo += [child for child, _ in node.next_functions]
