"""Precision on IPUs: float32, or float16 weights and inputs."""

from __future__ import annotations

from typing import Any, Callable, Literal, Optional

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ipu_bert.errors import UserError

SUPPORTED = ("32-true", "16-true")


class IPUPrecision(Precision):
    """32-true and 16-true. Backward, clipping and update happen on the IPUs."""

    precision: Literal["32-true", "16-true"]

    def __init__(self, precision: Literal["32-true", "16-true"] = "32-true") -> None:
        """Create the plugin.

        Args:
            precision: 16-true keeps weights and activations as float16.
        """
        self.precision = precision

    @property
    def half(self) -> bool:
        """Whether weights are float16."""
        return self.precision == "16-true"

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Turn the weights into float16, if asked for."""
        return module.half() if self.half else module

    def convert_input(self, data: Any) -> Any:
        """Turn floating-point inputs into the weights' type on the host: it halves the transfer."""
        dtype = torch.float16 if self.half else torch.float32
        return apply_to_collection(
            data, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t
        )

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Run the closure and the hooks behind it; the IPUs have updated the weights already."""
        result = self._wrap_closure(model, optimizer, closure)
        _count_as_stepped(getattr(optimizer, "_optimizer", optimizer))
        return result

    def clip_gradients(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Do nothing: gradients are clipped on the IPUs, and never come to the host."""


def _count_as_stepped(optimizer: Any) -> None:
    """Tell learning rate schedulers that the optimizer has stepped, or they warn of its order.

    `torch.optim.lr_scheduler.LRScheduler.step` looks at these (the first in torch 2.4 and later).
    """
    optimizer._opt_called = True
    optimizer._step_count = getattr(optimizer, "_step_count", 0) + 1


def for_ipu(plugin: Optional[Precision]) -> Optional[Precision]:
    """Return the counterpart of one of Lightning's plugins on IPUs.

    Raises:
        UserError: If IPUs do not have the precision.
    """
    if plugin is None or isinstance(plugin, IPUPrecision):
        return plugin
    precision = str(getattr(plugin, "precision", "32-true"))
    if precision not in SUPPORTED or type(plugin) not in (Precision, HalfPrecision):
        raise UserError(
            f"precision={precision!r} is not supported on IPUs. Use one of {', '.join(SUPPORTED)}."
        )
    return IPUPrecision(precision)  # type: ignore[arg-type]
