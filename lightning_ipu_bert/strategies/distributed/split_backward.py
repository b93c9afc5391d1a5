"""Whether torch can split the backward of a stage into input and weight gradients.

It cannot where a parameter is used several times, and computes no gradients where the input of a
stage needs none. Tried on a micro-batch, beside a backward that is not split.
"""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence

import torch
from torch import Tensor

from lightning_ipu_bert._compat.torch import backward_in_two_parts
from lightning_ipu_bert.batch_trees import tensors_of
from lightning_ipu_bert.strategies.distributed.stage import Stage

Gradients = Dict[str, Optional[Tensor]]


def why_not_split(stage: Stage, incoming: Sequence[Tensor]) -> Optional[str]:
    """Return why the backward of a stage cannot be split, or None if it can.

    Args:
        stage: The stage, in a dry run.
        incoming: Its input, of any values; [] for the first stage, whose backward is not split.
    """
    if not incoming:
        return None
    if not any(hidden.requires_grad for hidden in incoming):
        return "its input needs no gradient, because all parameters before it are frozen"
    parameters = {n: p for n, p in stage.named_parameters() if p.requires_grad}
    before = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        whole = _gradients(stage, incoming, split=False)
        split = _gradients(stage, incoming, split=True)
    except RuntimeError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0].split(" (")[0].split(". ")[0]
        return f"torch cannot split its backward: {reason}"
    finally:
        for name, parameter in parameters.items():
            parameter.grad = before[name]
    different = [name for name in parameters if not _close(whole[name], split[name])]
    return f"a split backward gives other gradients of {different[0]}" if different else None


def _gradients(stage: Stage, incoming: Sequence[Tensor], split: bool) -> Gradients:
    """Return the gradients of the parameters for random input and a random output gradient."""
    torch.manual_seed(0)
    hidden: List[Tensor] = []
    for shape in incoming:
        values = torch.randn_like(shape) if shape.is_floating_point() else shape.detach()
        hidden.append(values.requires_grad_(shape.requires_grad))
    for parameter in stage.parameters():
        parameter.grad = None
    with torch.enable_grad():
        outputs = [t for t in tensors_of(stage(*hidden, index=torch.tensor([0]))) if t.grad_fn]
    gradients = [torch.randn_like(output) for output in outputs]
    if split:
        backward_in_two_parts(outputs, gradients, hidden, list(stage.parameters()))
    else:
        torch.autograd.backward(outputs, gradients)
    return {name: parameter.grad for name, parameter in stage.named_parameters()}


def _close(one: Optional[Tensor], other: Optional[Tensor]) -> bool:
    if one is None or other is None:
        return one is other
    scale = float(one.abs().max()) or 1.0
    tolerance = 1e-3 if one.dtype == torch.float32 else 0.1
    return bool(torch.allclose(one, other, atol=tolerance * scale, rtol=0.0, equal_nan=True))
