"""Annotations of stages on IPUs, which exist only while PopTorch traces the model.

Modules are not replaced: all parameters keep their identity and name.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Iterator, List, Optional, Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.functional import embedding

from lightning_ipu_bert._compat.torch import count_pre_hooks
from lightning_ipu_bert.batch_trees import map_tree
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.ipu.program import ProgramConfig, serialization_rule
from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.pipeline.rules import enforce
from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch


@contextmanager
def annotated(module: nn.Module, plan: Plan, program: ProgramConfig) -> Iterator[None]:
    """Annotate stages and recomputation within the context.

    Args:
        module: Contains the blocks by name.
        plan: The plan of the run.
        program: The program to compile.
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
            for name in plan.layers[:-1]:  # the output of the last layer is stored anyway
                hook = module.get_submodule(name).register_forward_hook(_keep_output)
                undo.callback(hook.remove)
        if program.embedding_serialization_factor > 1:
            table = _largest_table(module, stages[0])
            undo.enter_context(serialized(table, program.embedding_serialization_factor))
        yield


def notice_removed_blocks(module: nn.Module) -> None:
    """Remove blocks that the author of a module has set, with a notice: the plan sets others."""
    before = count_pre_hooks(module)
    import_poptorch().removeBlocks(module)
    removed = before - count_pre_hooks(module)
    if removed:
        rank_zero_info(
            f"Removed {removed} BeginBlock annotations of {type(module).__name__}: blocks are "
            "placed by layers_per_stage."
        )


def _keep_output(module: nn.Module, inputs: object, output: object) -> object:
    poptorch = import_poptorch()
    return map_tree(
        output, lambda x: poptorch.recomputationCheckpoint(x) if isinstance(x, Tensor) else x
    )


@contextmanager
def serialized(table: nn.Embedding, factor: int) -> Iterator[None]:
    """Serialize the lookup in an embedding table within the context.

    Args:
        table: The table, of which only `forward` is replaced.
        factor: Number of equal parts.

    Raises:
        UserError: If the factor does not divide the rows.
    """
    enforce(serialization_rule(table.num_embeddings, factor))
    table.forward = partial(lookup_in_parts, table, factor)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del table.forward  # restores the method of the class


def lookup_in_parts(table: nn.Embedding, factor: int, ids: Tensor) -> Tensor:
    """Return the rows of `ids` like the table itself, with a separate lookup for each part.

    The parts are slices of a single parameter; how much memory this saves on IPUs has not been
    measured.

    Args:
        table: [V, D]
        factor: Number of parts.
        ids: Indices in [0, V), of any shape.

    Returns:
        The rows, of shape [*ids.shape, D].
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
    """Return the index of the padding row within a part, or None if it is in another part."""
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
            "has no embedding table. Remove it."
        )
    return max(tables, key=lambda table: table.num_embeddings)
