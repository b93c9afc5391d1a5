"""`Dropout`: a drop-in replacement of `torch.nn.Dropout` that is faster on CPUs."""

from __future__ import annotations

from typing import Any, Tuple

from torch import Tensor, nn
from torch.autograd import Function
from typing_extensions import override

from lightning_ipu_bert._compat.torch import runs_eagerly_on_cpu
from lightning_ipu_bert.ops.masks import dropped_share, has_mask, keep_mask, masked, masked_
from lightning_ipu_bert.ops.parts import refuse_second_derivatives


class Dropout(nn.Dropout):
    """Dropout whose masks cost a fraction of those of `torch.nn.Dropout` on CPUs.

    A mask takes 16 random bits per element, seeded by torch's default generator, so elements are
    dropped at the rate `p` to 1/65536, and masks repeat when the random state is restored. On other
    devices, in compiled and traced modules, and with `inplace`, it is `torch.nn.Dropout`.
    """

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Return the input with elements dropped in training mode, scaled by 1 / (1 - p)."""
        cheap = self.training and has_mask(self.p) and not self.inplace
        if not (cheap and runs_eagerly_on_cpu(input) and input.is_floating_point()):
            return super().forward(input)
        function: Any = _Dropout
        output: Tensor = function.apply(input, self.p)
        return output


class _Dropout(Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask = keep_mask(x.shape, p, x.dtype)
        ctx.save_for_backward(mask)
        ctx.scale = 1 / (1 - dropped_share(p))
        return masked(x.contiguous(), mask).mul_(ctx.scale)

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Tensor, None]:
        refuse_second_derivatives()
        (mask,) = ctx.saved_tensors
        return masked_(gradient * ctx.scale, mask), None
