"""Stages on IPUs: the blocks of a model are annotated while PopTorch traces it, and only then.

Nothing is replaced: every parameter keeps its identity and its name.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Iterator, List, Optional, Sequence

from torch import Tensor, nn
from torch.nn.functional import embedding

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.ipu.program import ProgramConfig, serialization_rule
from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.pipeline.rules import enforce
from lightning_ipu_bert.strategies.batch_trees import map_tree
from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch


@contextmanager
def annotated(module: nn.Module, plan: Plan, program: ProgramConfig) -> Iterator[None]:
    """Let a model be traced as stages within the block.

    Args:
        module: Holds the blocks under their names.
        plan: Says which blocks each IPU holds, and whether layers are recomputed.
        program: Training or inference.
    """
    poptorch = import_poptorch()
    stages = plan.of(program.training).stages
    with ExitStack() as undo:
        for ipu, names in enumerate(stages):
            for name in names:
                block = module.get_submodule(name)
                poptorch.BeginBlock(block, name, ipu_id=ipu)
                undo.callback(poptorch.removeBlocks, block)
        if plan.recompute and program.training:
            for name in plan.layers[:-1]:  # what follows the last layer keeps its output
                hook = module.get_submodule(name).register_forward_hook(_keep_output)
                undo.callback(hook.remove)
        if program.embedding_serialization_factor > 1:
            table = _largest_table(module, stages[0])
            undo.enter_context(serialized(table, program.embedding_serialization_factor))
        yield


def _keep_output(module: nn.Module, inputs: Any, output: Any) -> Any:
    poptorch = import_poptorch()
    return map_tree(
        output, lambda x: poptorch.recomputationCheckpoint(x) if isinstance(x, Tensor) else x
    )


@contextmanager
def serialized(table: nn.Embedding, factor: int) -> Iterator[None]:
    """Let an embedding table be read in parts within the block.

    Args:
        table: Is not changed but for its forward.
        factor: How many equal parts.

    Raises:
        UserError: If the factor does not divide the rows.
    """
    enforce(serialization_rule(table.num_embeddings, factor))
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
