"""Gradients of large tables of embeddings, added where they belong.

The gradient of a lookup has the size of its table, and all but a few of its rows are zero. Autograd
would fill such a one and add it for every micro-batch: with MiniLM's 47 MB of words, and one
sequence in a micro-batch, a tenth of the first stage's time on a CPU.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any, Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_ipu_bert._compat.torch import has_gradient_hooks

LARGE = 1 << 20
"""Numbers in a table from which on this is worth while."""


class _AddRows(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, anchor: Tensor, rows: Tensor, table: nn.Embedding, ids: Tensor) -> Tensor:
        ctx.table, ctx.ids = table, ids
        ctx.mark_dirty(rows)  # it is given back as it is, and may be changed in place
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
def rows_added_in_place(stages: Sequence[nn.Module]) -> Iterator[None]:
    """Let lookups in large tables add the rows of their gradients to the tables' own.

    Args:
        stages: The first one, if it is here. In others a schedule may run backward towards the
            weights that it knows of, and pass by what is added in place.
    """
    with ExitStack() as stack:
        for stage in stages:
            for module in stage.modules():
                if _is_large_table(module):
                    # First of all hooks: what a user's own changes comes after it.
                    hook = module.register_forward_hook(_replace, prepend=True)
                    stack.callback(hook.remove)
        yield


def _is_large_table(module: nn.Module) -> bool:
    if type(module) is not nn.Embedding:  # subclasses may look up in a way of their own
        return False
    weight = module.weight
    if weight.numel() < LARGE or weight.device.type != "cpu":  # CUDA adds rows in any order
        return False
    hooked = has_gradient_hooks(weight)
    special = module.sparse or module.scale_grad_by_freq or hooked or not weight.is_leaf
    return weight.requires_grad and not special


def _replace(table: Any, args: Tuple[Tensor, ...], rows: Tensor) -> Optional[Tensor]:
    if not rows.requires_grad or not args:
        return None
    anchor = torch.zeros((), device=rows.device, requires_grad=True)
    replaced: Tensor = _AddRows.apply(anchor, rows.detach(), table, args[0])  # type: ignore[no-untyped-call]
    return replaced
