"""Precision plugin for IPUs: float32, or float16 weights and inputs."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ipu_bert.pipeline.rules import choice_rule, enforce
from lightning_ipu_bert.strategies.refusals import precision_of

SUPPORTED = ("32-true", "16-true")


class IPUPrecision(Precision):
    """32-true and 16-true. Backward, clipping and update run on the IPUs."""

    precision: Literal["32-true", "16-true"]

    def __init__(self, precision: Literal["32-true", "16-true"] = "32-true") -> None:
        """Create the plugin.

        Args:
            precision: 32-true, or 16-true for float16 weights and activations.

        Raises:
            UserError: If it is something else.
        """
        enforce(choice_rule("precision", precision, SUPPORTED))
        self.precision = precision

    @property
    def half(self) -> bool:
        """Whether weights are float16."""
        return self.precision == "16-true"

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the weights to float16 with 16-true."""
        return module.half() if self.half else module

    @override
    def convert_input(self, data: object) -> object:
        """Convert floating-point inputs to the dtype of the weights, on the host."""
        dtype = torch.float16 if self.half else torch.float32
        return apply_to_collection(
            data, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t
        )

    @override
    def clip_gradients(self, optimizer: Optimizer, *args: object, **kwargs: object) -> None:
        """Do nothing: gradients are clipped on the IPUs."""


def for_ipu(plugin: Precision) -> IPUPrecision:
    """Return the counterpart of a precision plugin of Lightning for IPUs.

    Raises:
        UserError: If IPUs do not support the precision.
    """
    if isinstance(plugin, IPUPrecision):
        return plugin
    half = precision_of(plugin, (Precision, HalfPrecision), SUPPORTED, "on IPUs") == "16-true"
    return IPUPrecision("16-true" if half else "32-true")
