"""Losses whose gradients were computed before `backward` is called."""

from __future__ import annotations

from typing import Any, Callable, List, Tuple

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
    """Return a loss whose `backward` installs gradients that were already computed.

    A schedule runs forward and backward together, but Lightning calls `zero_grad` between
    `training_step` and `backward`, which would silently discard gradients.

    Args:
        loss: The value of the loss.
        gradients: The gradients of the loss, times `scale`.
        scale: Factor of the loss when its gradients were computed. The incoming gradient of
            `backward` (of a loss scaler or the user) is divided by it.
    """

    def install(incoming: Tensor) -> None:
        factor = incoming / scale
        for parameter, gradient in gradients:
            scaled = gradient.mul_(factor.to(gradient.device, gradient.dtype))
            parameter.grad = scaled if parameter.grad is None else parameter.grad.add_(scaled)
        gradients.clear()

    return bridged_to(loss, install)


def bridged_to(loss: Tensor, install: Callable[[Tensor], None]) -> Tensor:
    """Return a loss whose `backward` calls `install` with its incoming gradient.

    Args:
        loss: The value of the loss.
        install: Called with the gradient of the loss: 1, or the factor of the user.
    """
    anchor = torch.zeros((), device=loss.device, requires_grad=True)
    result: Tensor = _Bridge.apply(anchor, loss, install)  # type: ignore[no-untyped-call]
    return result


def take_gradients(
    parameters: List[nn.Parameter], run: Callable[[], Tensor]
) -> Tuple[Tensor, Gradients]:
    """Return the value of `run` and the gradients it computes; earlier gradients are restored."""
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
