"""The first half of a BERT layer: self-attention, projection, dropout, residual and LayerNorm."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import scaled_dot_product_attention
from typing_extensions import override

from lightning_ipu_bert._compat.onednn import linear
from lightning_ipu_bert.ops.accumulation import Linear, linear_backward, once
from lightning_ipu_bert.ops.attention import Weights, attend, attend_backward
from lightning_ipu_bert.ops.masks import has_mask
from lightning_ipu_bert.ops.parts import (
    Normalization,
    Projection,
    drop_add_norm,
    drop_add_norm_backward,
    projected_without_gradient,
    refuse_second_derivatives,
)


class AttentionParameters(NamedTuple):
    """Parameters of the block: D = heads * d, weights [D, D] and the others [D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_bias: Tensor
    key_bias: Tensor
    value_bias: Tensor
    output: Tensor
    output_bias: Tensor
    norm: Tensor
    norm_bias: Tensor


class AttentionSettings(NamedTuple):
    """Settings of the block."""

    heads: int
    attention_dropout: float
    """Rate of dropout of the attention probabilities; 0 in evaluation."""
    hidden_dropout: float
    """Rate of dropout of the output; 0 in evaluation."""
    eps: float
    """Of LayerNorm."""
    dtype: torch.dtype
    """Type of the products and of the output."""


def attention_block(
    hidden: Tensor,
    bias: Optional[Tensor],
    settings: AttentionSettings,
    parameters: AttentionParameters,
) -> Tensor:
    """Return the output of the block.

    Args:
        hidden: [B, S, D]
        bias: [B, 1, 1 or S, S], added to the scores; None without.
        settings: Settings.
        parameters: Parameters.

    Returns:
        [B, S, D] in the type of the settings.

    Source:
        Devlin et al., BERT (arXiv:1810.04805), section 3.
    """
    if not torch.is_grad_enabled() and not has_mask(settings.attention_dropout):
        return _without_gradient(hidden, bias, settings, parameters)
    function: Any = _AttentionBlock
    output: Tensor = function.apply(hidden, bias, settings, *parameters)
    return output


def _without_gradient(
    hidden: Tensor, bias: Optional[Tensor], settings: AttentionSettings, p: AttentionParameters
) -> Tensor:
    """Return the output by torch's attention, which stores no scores: faster without a backward."""
    with torch.autocast("cpu", enabled=False):
        x = hidden.to(settings.dtype).reshape(-1, hidden.shape[-1])
        q, k, v = _all_heads(hidden, x, settings, *_query_key_value(p, settings.dtype))
        context = scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).reshape(x.shape)
        to = Projection(p.output, p.output_bias, p.norm, p.norm_bias)
        output = projected_without_gradient(context, x, to, settings.eps, settings.hidden_dropout)
    return output.view(hidden.shape)


def _query_key_value(p: AttentionParameters, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
    """Return weight and bias of one product, [N, D] -> [N, 3 D], which reads its input once."""

    def make() -> Tuple[Tensor, Tensor]:
        weight = torch.cat([p.query, p.key, p.value]).to(dtype)
        return weight, torch.cat([p.query_bias, p.key_bias, p.value_bias]).to(dtype)

    return once(p.query, dtype, make)


def _all_heads(
    hidden: Tensor, x: Tensor, settings: AttentionSettings, weight: Tensor, bias: Tensor
) -> Tensor:
    """Return query, key and value, [3, B, H, S, d], not contiguous."""
    batch, length, size = hidden.shape
    shape = (batch, length, 3, settings.heads, size // settings.heads)
    return linear(x, weight, bias).view(shape).permute(2, 0, 3, 1, 4)


def _projected(
    heads: Tensor, x: Tensor, p: AttentionParameters, weight: Tensor, settings: AttentionSettings
) -> Tuple[Tensor, Tensor, Normalization]:
    """Return the context, [B, H, S, d] -> [N, D], the output, and what its backward needs."""
    context = heads.transpose(1, 2).reshape(len(x), -1)
    output, normalization = drop_add_norm(
        linear(context, weight, p.output_bias.to(x.dtype)),
        x,
        p.norm,
        p.norm_bias,
        settings.eps,
        settings.hidden_dropout,
    )
    return context, output, normalization


class _AttentionBlock(Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        hidden: Tensor,
        bias: Optional[Tensor],
        settings: AttentionSettings,
        *tensors: Tensor,
    ) -> Tensor:
        p, dtype = AttentionParameters(*tensors), settings.dtype
        with torch.autocast("cpu", enabled=False):
            x = hidden.to(dtype).reshape(-1, hidden.shape[-1])
            w_qkv, b_qkv = _query_key_value(p, dtype)
            qkv = _all_heads(hidden, x, settings, w_qkv, b_qkv).contiguous()
            qkv[0].mul_(qkv.shape[-1] ** -0.5)
            q, k, v = qkv
            heads, weights = attend(q, k, v, bias, settings.attention_dropout)
            w_out = once(p.output, dtype, lambda: p.output.to(dtype))
            context, output, normalization = _projected(heads, x, p, w_out, settings)
        ctx.settings, ctx.dtype, ctx.parameters = settings, hidden.dtype, p
        saved = (x, w_qkv, qkv, context, w_out, p.norm, p.norm_bias, *normalization)
        ctx.save_for_backward(*saved, *(tensor for chunk in weights for tensor in chunk))
        return output.view(hidden.shape)

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Optional[Tensor], ...]:
        refuse_second_derivatives()
        settings, needed = ctx.settings, AttentionParameters(*ctx.needs_input_grad[3:])
        x, w_qkv, qkv, context, w_out, norm, norm_bias, *rest = ctx.saved_tensors
        normalization = Normalization(*rest[:4])
        weights = [Weights(*rest[i : i + 2]) for i in range(4, len(rest), 2)]
        _, batch, heads, length, head_size = qkv.shape
        with torch.autocast("cpu", enabled=False):
            g = gradient.to(settings.dtype).reshape(x.shape)
            g, d_x, d_norm, d_norm_bias = drop_add_norm_backward(
                g, normalization, norm, norm_bias, settings.hidden_dropout
            )
            output = Linear([ctx.parameters.output], [ctx.parameters.output_bias])
            d_output = linear_backward(output, g, context, (needed.output, needed.output_bias))
            g = (g @ w_out).view(batch, length, heads, head_size).transpose(1, 2).contiguous()
            q, k, v = qkv
            d_qkv = attend_backward(g, q, k, v, weights, settings.attention_dropout)
            d_qkv[0].mul_(head_size**-0.5)
            d_qkv = d_qkv.permute(1, 3, 0, 2, 4).reshape(len(x), -1)  # [3, B, H, S, d] -> [N, 3 D]
            all_heads = Linear(ctx.parameters[:3], ctx.parameters[3:6])
            d_weight, d_bias = linear_backward(all_heads, d_qkv, x, needed[:6])
            d_x = torch.addmm(d_x, d_qkv, w_qkv).view(gradient.shape).to(ctx.dtype)
        parts = [x.chunk(3) if x is not None else (None,) * 3 for x in (d_weight, d_bias)]
        return (d_x, None, None, *parts[0], *parts[1], *d_output, d_norm, d_norm_bias)
