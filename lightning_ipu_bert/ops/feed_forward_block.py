"""The second half of a BERT layer: two linear layers with GELU, dropout, residual and LayerNorm."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import gelu
from typing_extensions import override

from lightning_ipu_bert._compat.onednn import linear, linear_gelu
from lightning_ipu_bert._compat.torch import gelu_backward
from lightning_ipu_bert.ops.accumulation import Linear, linear_backward, once
from lightning_ipu_bert.ops.parts import (
    Normalization,
    Projection,
    drop_add_norm,
    drop_add_norm_backward,
    projected_without_gradient,
    refuse_second_derivatives,
)


class FeedForwardParameters(NamedTuple):
    """Parameters of the block."""

    inner: Tensor
    """[F, D]"""
    inner_bias: Tensor
    """[F]"""
    output: Tensor
    """[D, F]"""
    output_bias: Tensor
    """[D], as the others."""
    norm: Tensor
    norm_bias: Tensor


class FeedForwardSettings(NamedTuple):
    """Settings of the block."""

    dropout: float
    """Rate of dropout of the output; 0 in evaluation."""
    eps: float
    """Of LayerNorm."""
    dtype: torch.dtype
    """Type of the products and of the output."""


def feed_forward_block(
    hidden: Tensor, settings: FeedForwardSettings, parameters: FeedForwardParameters
) -> Tensor:
    """Return the output of the block.

    Args:
        hidden: [B, S, D]
        settings: Settings.
        parameters: Parameters.

    Returns:
        [B, S, D] in the type of the settings.

    Source:
        Devlin et al., BERT (arXiv:1810.04805), section 3.
    """
    if not torch.is_grad_enabled():
        return _without_gradient(hidden, settings, parameters)
    function: Any = _FeedForwardBlock
    output: Tensor = function.apply(hidden, settings, *parameters)
    return output


def _without_gradient(
    hidden: Tensor, settings: FeedForwardSettings, p: FeedForwardParameters
) -> Tensor:
    """Return the output; the product contains GELU, whose input only a backward needs."""
    dtype = settings.dtype
    with torch.autocast("cpu", enabled=False):
        x = hidden.to(dtype).reshape(-1, hidden.shape[-1])
        activation = linear_gelu(x, p.inner.to(dtype), p.inner_bias.to(dtype))
        to = Projection(p.output, p.output_bias, p.norm, p.norm_bias)
        output = projected_without_gradient(activation, x, to, settings.eps, settings.dropout)
    return output.view(hidden.shape)


def _projected(
    activation: Tensor,
    x: Tensor,
    p: FeedForwardParameters,
    weight: Tensor,
    settings: FeedForwardSettings,
) -> Tuple[Tensor, Normalization]:
    """Return the output, [N, D], and what its backward needs."""
    total = linear(activation, weight, p.output_bias.to(x.dtype))
    return drop_add_norm(total, x, p.norm, p.norm_bias, settings.eps, settings.dropout)


class _FeedForwardBlock(Function):
    @staticmethod
    @override
    def forward(
        ctx: Any, hidden: Tensor, settings: FeedForwardSettings, *tensors: Tensor
    ) -> Tensor:
        p, dtype = FeedForwardParameters(*tensors), settings.dtype
        with torch.autocast("cpu", enabled=False):
            x = hidden.to(dtype).reshape(-1, hidden.shape[-1])
            w_inner = once(p.inner, dtype, lambda: p.inner.to(dtype))
            w_out = once(p.output, dtype, lambda: p.output.to(dtype))
            inner = linear(x, w_inner, p.inner_bias.to(dtype))  # [N, D] -> [N, F]
            activation = gelu(inner)
            output, normalization = _projected(activation, x, p, w_out, settings)
        ctx.settings, ctx.dtype, ctx.parameters = settings, hidden.dtype, p
        saved = (x, w_inner, inner, activation, w_out, p.norm, p.norm_bias)
        ctx.save_for_backward(*saved, *normalization)
        return output.view(hidden.shape)

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Optional[Tensor], ...]:
        refuse_second_derivatives()
        settings, needed = ctx.settings, FeedForwardParameters(*ctx.needs_input_grad[2:])
        x, w_inner, inner, activation, w_out, norm, norm_bias, *normalization = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            g = gradient.to(settings.dtype).reshape(x.shape)
            g, d_x, d_norm, d_norm_bias = drop_add_norm_backward(
                g, Normalization(*normalization), norm, norm_bias, settings.dropout
            )
            output = Linear([ctx.parameters.output], [ctx.parameters.output_bias])
            d_output = linear_backward(output, g, activation, (needed.output, needed.output_bias))
            g = gelu_backward(g @ w_out, inner)
            inner_layer = Linear([ctx.parameters.inner], [ctx.parameters.inner_bias])
            d_inner = linear_backward(inner_layer, g, x, (needed.inner, needed.inner_bias))
            d_x = torch.addmm(d_x, g, w_inner).view(gradient.shape).to(ctx.dtype)
        return (d_x, None, *d_inner, *d_output, d_norm, d_norm_bias)
