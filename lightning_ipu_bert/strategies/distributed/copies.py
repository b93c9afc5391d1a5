"""Copies of the model that callbacks make: averaged weights, the best ones so far."""

from __future__ import annotations

import weakref
from typing import Dict, Iterable, List, Set

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_ipu_bert.batch_trees import Path, paths_of, with_leaves


class ModelCopies:
    """Copies of the model on all ranks of a replica, each with the weights of its stages.

    They are numbered in the order in which they are made, which is the same on all ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Create the object without copies.

        Args:
            group: The ranks of this replica.
        """
        self._group = group
        self._references: List[weakref.ReferenceType[nn.Module]] = []

    def add(self, model: nn.Module) -> None:
        """Add a copy; it is not kept alive."""
        self._references.append(weakref.ref(model))

    def release(self) -> None:
        """Let the copies run in one process, without communication."""
        for model in filter(None, (reference() for reference in self._references)):
            vars(model)["pipeline_executor"] = None

    def common(self) -> List[nn.Module]:
        """Return the copies that exist on all ranks of the replica, which must all call it."""
        models = {i: reference() for i, reference in enumerate(self._references)}
        own = {number for number, model in models.items() if model is not None}
        parts: List[Set[int]] = [set()] * dist.get_world_size(self._group)
        dist.all_gather_object(parts, own, group=self._group)
        everywhere = set.intersection(*parts)
        if everywhere != set.union(*parts):
            rank_zero_warn(
                "A copy of the model exists on some ranks only, and lacks the weights of the other "
                "stages. Make copies on all ranks."
            )
        return [model for i, model in models.items() if i in everywhere and model is not None]


def copies_in(callbacks: Iterable[object], module: nn.Module, resumes: bool) -> List[nn.Module]:
    """Return the copies of a module that callbacks have made before the run, e.g. in `setup`.

    Another model of the same class, such as a teacher, is not a copy: it has other weights.

    Args:
        callbacks: The callbacks, whose attributes may be modules that contain a copy.
        module: The module.
        resumes: Whether copies may have other weights, from a checkpoint.
    """
    values = [value for callback in callbacks for value in vars(callback).values()]
    return [
        part
        for value in values
        if isinstance(value, nn.Module)
        for part in value.modules()
        if part is not module
        and type(part) is type(module)
        and _is_alike(part, module, resumes or isinstance(value, AveragedModel))
    ]


def _is_alike(one: nn.Module, other: nn.Module, shapes_only: bool) -> bool:
    """Return whether two models have the same parameters."""
    own, others = dict(one.named_parameters()), dict(other.named_parameters())
    shapes = ({name: p.shape for name, p in named.items()} for named in (own, others))
    if next(shapes) != next(shapes):
        return False
    return shapes_only or all(torch.equal(p, others[name]) for name, p in own.items())


def completed(checkpoint: Dict[str, object], group: dist.ProcessGroup) -> Dict[str, object]:
    """Return a checkpoint with the tensors of other stages, on the first rank of a replica.

    A callback saves its copy of the model on every rank: what is a meta tensor on the first rank is
    a tensor on another one, under the same keys.

    Args:
        checkpoint: The checkpoint as created on this rank.
        group: The ranks of this replica, which must all call it.
    """
    leaves = paths_of(checkpoint)
    first = dist.get_rank(group) == 0
    meta = [path for path, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.is_meta]
    object_list: List[List[Path]] = [meta]
    source = dist.get_global_rank(group, 0)
    dist.broadcast_object_list(object_list, source, group)
    if not object_list[0]:
        return checkpoint
    own = {path: leaves.get(path) for path in object_list[0]}
    own = {p: x.cpu() for p, x in own.items() if isinstance(x, Tensor) and not x.is_meta}
    parts: List[Dict[Path, object]] = [{}] * dist.get_world_size(group)
    dist.gather_object(own, parts if first else None, source, group)
    found = {path: leaf for part in parts for path, leaf in part.items()}
    if first and len(found) < len(meta):
        path = next(path for path in meta if path not in found)
        rank_zero_warn(
            f"The checkpoint has no values for {'/'.join(map(str, path))}, which is on another "
            "stage. Callbacks must copy and save weights on all ranks."
        )
    return with_leaves(checkpoint, found)
