"""Stages on IPUs: the blocks of a model are annotated while PopTorch traces it, and only then.

Nothing is replaced: every parameter keeps its identity and its name.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Iterator, List, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.ipu_rules import check_serialization
from lightning_ipu_bert.pipeline.partition import find_layers
from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch


@contextmanager
def annotated(
    module: nn.Module, stages: Sequence[Sequence[str]], recompute: bool, serialization: int
) -> Iterator[None]:
    """Let a model be traced as stages within the block.

    Args:
        module: Holds the blocks under their names.
        stages: The blocks on every IPU, in forward order.
        recompute: Whether outputs of layers are kept, and their insides computed again.
        serialization: Parts in which the largest embedding table is read.
    """
    poptorch = import_poptorch()
    blocks = [name for stage in stages for name in stage]
    first, count = find_layers(blocks)
    with ExitStack() as undo:
        for ipu, names in enumerate(stages):
            for name in names:
                block = module.get_submodule(name)
                poptorch.BeginBlock(block, name, ipu_id=ipu)
                undo.callback(poptorch.removeBlocks, block)
        if recompute:
            for name in blocks[first : first + count - 1]:  # what follows the last layer keeps it
                hook = module.get_submodule(name).register_forward_hook(_keep_output)
                undo.callback(hook.remove)
        if serialization > 1:
            undo.enter_context(serialized(_largest_table(module, stages[0]), serialization))
        yield


def _keep_output(module: nn.Module, inputs: Any, output: Any) -> Any:
    poptorch = import_poptorch()
    leaves, structure = torch.utils._pytree.tree_flatten(output)
    kept = [poptorch.recomputationCheckpoint(x) if isinstance(x, Tensor) else x for x in leaves]
    return torch.utils._pytree.tree_unflatten(kept, structure)


@contextmanager
def serialized(table: nn.Embedding, factor: int) -> Iterator[None]:
    """Let an embedding table be read in parts within the block.

    Args:
        table: Is not changed but for its forward.
        factor: How many equal parts.

    Raises:
        UserError: If the factor does not divide the rows.
    """
    check_serialization(table.num_embeddings, factor)
    table.forward = partial(lookup_in_parts, table, factor)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del table.forward  # the class's own shows again


def lookup_in_parts(table: nn.Embedding, factor: int, ids: Tensor) -> Tensor:
    """Return the rows of `ids` as the table itself does; each part is read by a lookup of its own.

    The parts are slices of one parameter, which stays what it is; how much memory on the IPU that
    saves has not been measured.

    Args:
        table: [V, D]
        factor: Number of parts.
        ids: Any shape, each in [0, V).

    Returns:
        The shape of `ids` and [D].
    """
    rows = table.num_embeddings // factor
    total: Optional[Tensor] = None
    for part in range(factor):
        local = ids - part * rows
        inside = (local >= 0) & (local < rows)
        found = embedding(
            local.clamp(0, rows - 1),
            table.weight[part * rows : (part + 1) * rows],
            _padding_in(table.padding_idx, part, rows),
        )
        found = found * inside.unsqueeze(-1).to(found.dtype)
        total = found if total is None else total + found
    assert total is not None
    return total


def _padding_in(padding_idx: Optional[int], part: int, rows: int) -> Optional[int]:
    """Return where the padding's row lies within a part, if it does. 0 is a row as any other."""
    if padding_idx is None or padding_idx // rows != part:
        return None
    return padding_idx - part * rows


def _largest_table(module: nn.Module, blocks: Sequence[str]) -> nn.Embedding:
    tables: List[nn.Embedding] = [
        found
        for name in blocks
        for found in module.get_submodule(name).modules()
        if isinstance(found, nn.Embedding)
    ]
    if not tables:
        raise UserError(
            f"embedding_serialization_factor is set, and the first stage ({', '.join(blocks)}) "
            "has no embedding table. Leave it out."
        )
    return max(tables, key=lambda table: table.num_embeddings)
