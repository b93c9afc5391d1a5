"""oneDNN, by operators of torch that have no public function.

Files are relative to https://github.com/pytorch/pytorch/tree/main.

- `mkldnn._linear_pointwise` (aten/src/ATen/native/mkldnn/Linear.cpp): a linear layer whose bias and
  activation, or the addition of another tensor, are part of the product. `torch.addmm` first copies
  the bias into the whole result.
- `mkldnn._is_mkldnn_bf16_supported` (aten/src/ATen/native/mkldnn/RegisterMkldnnOpContextClass.cpp):
  whether the processor can do it in bfloat16.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import gelu


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Return whether torch has the operator and the processor has instructions for bfloat16."""
    try:
        torch.ops.mkldnn._linear_pointwise  # noqa: B018  # raises an error where torch has none
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def _linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(
        x, weight, bias, activation, [], "none"
    )
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x weight^T + bias: [N, D_in] -> [N, D_out]; all in one type."""
    if x.dtype == torch.bfloat16 and multiplies_bfloat16():
        return _linear(x, weight, bias, "none")
    return torch.addmm(bias, x, weight.t())


def linear_add(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """Return x weight^T + bias + other."""
    if x.dtype == torch.bfloat16 and multiplies_bfloat16():
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, "add")
        return total
    return torch.addmm(bias, x, weight.t()).add_(other)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return gelu(x weight^T + bias)."""
    if x.dtype == torch.bfloat16 and multiplies_bfloat16():
        return _linear(x, weight, bias, "gelu")
    return gelu(torch.addmm(bias, x, weight.t()))
