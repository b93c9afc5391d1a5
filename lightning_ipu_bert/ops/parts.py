"""What both halves of a layer have in common, with its backward: [N, D], a row per token."""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from lightning_ipu_bert._compat.onednn import linear, linear_add
from lightning_ipu_bert._compat.torch import layer_norm_backward
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.ops.masks import dropped_share, has_mask, keep_mask, masked, masked_


def refuse_second_derivatives() -> None:
    """Raise an error in a backward whose result would have to be differentiated.

    Raises:
        UserError: If it runs with ``create_graph=True``: the result would count as a constant.
    """
    if torch.is_grad_enabled():
        raise UserError(
            "The kernels for CPUs have no second derivatives, which create_graph=True needs. "
            "Set fast_kernels=False."
        )


class Normalization(NamedTuple):
    """What the backward of `drop_add_norm` needs."""

    total: Tensor
    """[N, D]: input of LayerNorm."""
    mean: Tensor
    rstd: Tensor
    mask: Optional[Tensor]
    """Of the dropout; None without."""


def drop_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float
) -> Tuple[Tensor, Normalization]:
    """Return LayerNorm(dropout(x) + residual), and what the backward needs; `x` is modified."""
    mask = keep_mask(x.shape, p, x.dtype)
    total = torch.add(residual, masked_(x, mask), alpha=1 / (1 - dropped_share(p)))
    output, mean, rstd = torch.native_layer_norm(total, weight.shape, weight, bias, eps)
    return output, Normalization(total, mean, rstd, mask)


class Projection(NamedTuple):
    """Parameters at the end of both halves of a layer."""

    weight: Tensor
    """[D, D_in]"""
    bias: Tensor
    """[D], as the others."""
    norm: Tensor
    norm_bias: Tensor


def projected_without_gradient(
    x: Tensor, residual: Tensor, to: Projection, eps: float, p: float
) -> Tensor:
    """Return LayerNorm(dropout(x weight^T + bias) + residual): [N, D_in] -> [N, D]."""
    weight, bias = to.weight.to(x.dtype), to.bias.to(x.dtype)
    if has_mask(p):
        return drop_add_norm(linear(x, weight, bias), residual, to.norm, to.norm_bias, eps, p)[0]
    total = linear_add(x, weight, bias, residual)
    return torch.native_layer_norm(total, to.norm.shape, to.norm, to.norm_bias, eps)[0]


def drop_add_norm_backward(
    gradient: Tensor, kept: Normalization, weight: Tensor, bias: Tensor, p: float
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, residual, weight and bias."""
    d_total, d_weight, d_bias = layer_norm_backward(
        gradient, kept.total, kept.mean, kept.rstd, weight, bias
    )
    if kept.mask is None:
        return d_total, d_total, d_weight, d_bias
    return masked(d_total, kept.mask).mul_(1 / (1 - dropped_share(p))), d_total, d_weight, d_bias


def linear_gradients(
    gradient: Tensor, x: Tensor, needed: Sequence[object]
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Return the gradients of weight and bias of a linear layer, None for those not needed.

    Args:
        gradient: [N, D_out], of the output.
        x: [N, D_in]
        needed: Whether any of each is needed.
    """
    if not any(needed):
        return None, None
    # In bfloat16 a product with more rows than columns is faster, though its result is transposed.
    wide = gradient.dtype == torch.bfloat16 and x.shape[1] > gradient.shape[1]
    weight = (x.t() @ gradient).t() if wide else gradient.t() @ x
    return weight, gradient.sum(0)
