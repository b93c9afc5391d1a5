"""In-place accumulation of the gradients of large embedding tables.

The gradient of a lookup has the size of the table, and all but a few of its rows are zero. Autograd
allocates and adds such a gradient for every micro-batch: for the 47 MB table of MiniLM and one
sequence per micro-batch, a tenth of the time of the first stage on a CPU.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any, Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_ipu_bert._compat.torch import has_gradient_hooks

LARGE = 1 << 20
"""Minimum number of elements of a table for which this is used."""


class _AddRows(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, anchor: Tensor, rows: Tensor, table: nn.Embedding, ids: Tensor) -> Tensor:
        ctx.table, ctx.ids = table, ids
        ctx.mark_dirty(rows)  # returned unchanged, and may be modified in place
        return rows

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> Tuple[None, None, None, None]:
        table, ids = ctx.table, ctx.ids.reshape(-1)
        rows = gradients[0].reshape(len(ids), -1)
        if table.padding_idx is not None:
            rows = rows.masked_fill((ids == table.padding_idx)[:, None], 0.0)
        if table.weight.grad is None:
            table.weight.grad = torch.zeros_like(table.weight)
        table.weight.grad.index_add_(0, ids, rows.to(table.weight.dtype))
        return None, None, None, None


@contextmanager
def accumulated_in_place(stages: Sequence[nn.Module]) -> Iterator[None]:
    """Accumulate the gradients of lookups in large tables in place, within the context.

    Args:
        stages: The first stage, if it is on this rank. In other stages, schedules may compute
            gradients of only the inputs or weights and would skip the in-place accumulation.
    """
    with ExitStack() as stack:
        for stage in stages:
            for module in stage.modules():
                if _is_large_table(module):
                    # Before the hooks of the user, which may modify the output.
                    hook = module.register_forward_hook(_replace, prepend=True)
                    stack.callback(hook.remove)
        yield


def _is_large_table(module: nn.Module) -> bool:
    if type(module) is not nn.Embedding:  # subclasses may override the lookup
        return False
    weight = module.weight
    if weight.numel() < LARGE or weight.device.type != "cpu":  # not deterministic on CUDA
        return False
    hooked = has_gradient_hooks(weight)
    special = module.sparse or module.scale_grad_by_freq or hooked or not weight.is_leaf
    return weight.requires_grad and not special


def _replace(table: object, args: Tuple[Tensor, ...], rows: Tensor) -> Optional[Tensor]:
    if not rows.requires_grad or not args:
        return None
    anchor = torch.zeros((), device=rows.device, requires_grad=True)
    replaced: Tensor = _AddRows.apply(anchor, rows.detach(), table, args[0])  # type: ignore[no-untyped-call]
    return replaced
