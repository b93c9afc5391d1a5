"""The blocks of a module, and the parameters of each block."""

from __future__ import annotations

import re
from typing import (
    AbstractSet,
    Any,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from lightning_ipu_bert.pipeline.rules import Violation, nearest

NUMBERED = re.compile(r"((?P<series>.*)\.)?(?P<number>\d+)")


class ModuleOutline(NamedTuple):
    """The properties of a module that a plan depends on."""

    name: str
    """Class name, for messages."""
    blocks: Tuple[str, ...]
    """Names of all blocks in forward order."""
    names_of_parameter: Mapping[str, Tuple[str, ...]]
    """All names of every parameter, by its first name; tied parameters have several."""
    labels: Mapping[str, str]
    """Display names; see `PipelineModule.block_labels`."""
    submodules: AbstractSet[str]
    """Names of all submodules."""

    @property
    def blocks_of_parameter(self) -> Dict[str, AbstractSet[str]]:
        """The blocks that hold each parameter, by each name of the parameter.

        A parameter in no block belongs to the last one: `pipeline_loss` may use it.
        """
        return {
            name: self.owners(names) or {self.blocks[-1]}
            for names in self.names_of_parameter.values()
            for name in names
        }

    def owners(self, names: Sequence[str]) -> AbstractSet[str]:
        """Return the blocks that hold a parameter; names outside of blocks are only aliases."""
        found = {block_of(name, self.blocks) for name in names}
        return {block for block in found if block is not None}


def outline_of(module: Any) -> ModuleOutline:
    """Return the outline of a module that implements the protocol."""
    names_by_id: Dict[int, List[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names_by_id.setdefault(id(parameter), []).append(name)
    return ModuleOutline(
        type(module).__name__,
        tuple(module.pipeline_blocks()),
        {names[0]: tuple(names) for names in names_by_id.values()},
        module.block_labels,
        {name for name, _ in module.named_modules(remove_duplicate=False)},
    )


def block_of(name: str, blocks: Sequence[str]) -> Optional[str]:
    """Return the block that holds the parameter or buffer `name`, or None."""
    return next((block for block in blocks if name.startswith(f"{block}.")), None)


def series_of(block: str) -> Optional[str]:
    """Return the name without the trailing number, or None without one."""
    match = NUMBERED.fullmatch(block)
    return match["series"] or "" if match else None


def block_rules(outline: ModuleOutline) -> Iterator[Violation]:
    """Blocks must be distinct submodules, and must not share parameters."""
    name, blocks = outline.name, outline.blocks
    duplicates = sorted({block for block in blocks if blocks.count(block) > 1})
    if duplicates or not blocks:
        yield Violation(
            f"{name}.pipeline_blocks()",
            None,
            f"returns {duplicates or 'no block'}{' more than once' if duplicates else ''}",
            "Return every block once, in forward order.",
        )
        return
    for block in blocks:
        if block not in outline.submodules:
            close = nearest(block, outline.submodules)
            yield Violation(
                f"{name}.pipeline_blocks()",
                None,
                f"returns {block!r}, which is not a submodule",
                f"Did you mean {close!r}?",
            )
    for names in outline.names_of_parameter.values():
        if len(outline.owners(names)) > 1:
            tied = [parameter for parameter in names if block_of(parameter, blocks)]
            yield Violation(
                name,
                None,
                f"ties the parameters {' and '.join(tied)}, which are in different blocks",
                "Untie them: stages cannot share weights.",
            )
