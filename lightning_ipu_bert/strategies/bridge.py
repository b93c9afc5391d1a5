"""Gradients that were computed before `backward` was called."""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Tuple

import torch
from torch import Tensor, nn
from typing_extensions import override

Gradients = List[Tuple[nn.Parameter, Tensor]]


class _Bridge(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any, anchor: Tensor, loss: Tensor, install: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.install = install
        return loss.detach().clone()

    @staticmethod
    @override
    def backward(ctx: Any, *incoming: Tensor) -> Tuple[Tensor, None, None]:
        ctx.install(incoming[0])
        return torch.zeros_like(incoming[0]), None, None


def bridged(loss: Tensor, gradients: Gradients, scale: float) -> Tensor:
    """Return a loss whose `backward` puts gradients into place that are there already.

    A schedule runs forward and backward in one go, but Lightning calls `zero_grad` between
    `training_step` and `backward`: gradients left in place would be wiped out, silently.

    Args:
        loss: The value of the loss.
        gradients: The gradients of the loss, times `scale`.
        scale: What the loss was multiplied by before its gradients were computed. A factor that
            `backward` brings (a loss scaler's, the user's own) is set off against it.
    """

    def install(incoming: Tensor) -> None:
        factor = incoming / scale
        for parameter, gradient in gradients:
            scaled = gradient.mul_(factor.to(gradient.device, gradient.dtype))
            parameter.grad = scaled if parameter.grad is None else parameter.grad.add_(scaled)
        gradients.clear()

    return bridged_to(loss, install)


def bridged_to(loss: Tensor, install: Callable[[Tensor], None]) -> Tensor:
    """Return a loss whose `backward` calls `install` with the gradient that it is given.

    Args:
        loss: The value of the loss.
        install: Is called with d(what was differentiated)/d(loss): 1, or the user's factor.
    """
    anchor = torch.zeros((), device=loss.device, requires_grad=True)
    result: Tensor = _Bridge.apply(anchor, loss, install)  # type: ignore[no-untyped-call]
    return result


def take_gradients(
    parameters: List[nn.Parameter], run: Callable[[], Optional[Tensor]]
) -> Tuple[Optional[Tensor], Gradients]:
    """Call `run` and return its value and the gradients it made; those before it stay in place."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        value = run()
    finally:
        made = [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, before):
            parameter.grad = gradient
    return value, [(p, gradient) for p, gradient in zip(parameters, made) if gradient is not None]
