"""The blocks of a module, and which of its parameters are in which."""

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

from lightning_ipu_bert.pipeline.rules import Violation

NUMBERED = re.compile(r"((?P<series>.*)\.)?(?P<number>\d+)")


class ModuleOutline(NamedTuple):
    """What a plan needs to know of a module."""

    name: str
    """Name of its class, for messages."""
    blocks: Tuple[str, ...]
    """Names of all blocks in forward order."""
    names_of_parameter: Mapping[str, Tuple[str, ...]]
    """For every parameter, by its first name, all names that it has; tied ones have several."""
    labels: Mapping[str, str]
    """Names for people; see `PipelineModule.block_labels`."""

    @property
    def blocks_of_parameter(self) -> Dict[str, AbstractSet[Optional[str]]]:
        """For every parameter, by each of its names, the blocks that hold it."""
        return {
            name: {block_of(other, self.blocks) for other in names}
            for names in self.names_of_parameter.values()
            for name in names
        }


def outline_of(module: Any) -> ModuleOutline:
    """Return the outline of a module that offers the protocol."""
    homes: Dict[int, List[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        homes.setdefault(id(parameter), []).append(name)
    return ModuleOutline(
        type(module).__name__,
        tuple(module.pipeline_blocks()),
        {names[0]: tuple(names) for names in homes.values()},
        module.block_labels,
    )


def block_of(name: str, blocks: Sequence[str]) -> Optional[str]:
    """Return the block that holds a parameter or buffer of this name, if one does."""
    return next((block for block in blocks if name.startswith(f"{block}.")), None)


def series_of(block: str) -> Optional[str]:
    """Return the name before the number at the end, or None if there is no number."""
    match = NUMBERED.fullmatch(block)
    return match["series"] or "" if match else None


def block_rules(outline: ModuleOutline) -> Iterator[Violation]:
    """Blocks are distinct and hold every parameter once."""
    name, blocks = outline.name, outline.blocks
    twice = sorted({block for block in blocks if blocks.count(block) > 1})
    if twice or not blocks:
        yield Violation(
            f"{name}.pipeline_blocks()",
            None,
            f"names {twice or 'no block'}{' more than once' if twice else ''}",
            "Return every block once, in forward order.",
        )
        return
    for names in outline.names_of_parameter.values():
        owners = {block_of(parameter, blocks) for parameter in names}
        if None in owners:
            yield Violation(
                f"The parameter {names[0]} of {name}",
                None,
                f"belongs to no block of pipeline_blocks(): {list(blocks)}",
                "Put it into one of them.",
            )
        elif len(owners) > 1:
            yield Violation(
                name,
                None,
                f"ties the parameters {' and '.join(names)}, which belong to different blocks",
                "Untie them: stages cannot share weights.",
            )
