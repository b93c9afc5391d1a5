"""Shapes of the tensors that stages exchange, found by running every stage once."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Dict, Hashable, Iterator, List, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ipu_bert.batch_trees import map_tree, shape_key
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.pipeline.schedules import SCHEDULES
from lightning_ipu_bert.strategies.distributed.mesh import Mesh
from lightning_ipu_bert.strategies.distributed.split_backward import why_not_split
from lightning_ipu_bert.strategies.distributed.stage import ScheduleCall, Stage


@dataclass(frozen=True)
class TensorShape:
    """Shape and dtype of a tensor that a rank will receive."""

    shape: Tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> TensorShape:
        """Return the shape of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    def zeros(self, device: torch.device) -> Tensor:
        """Return a tensor of zeros."""
        zeros = torch.zeros(self.shape, dtype=self.dtype, device=device)
        return zeros.requires_grad_(self.requires_grad)


def shapes_of(value: object) -> object:
    """Replace the tensors of a structure by their shapes."""
    return map_tree(value, lambda x: TensorShape.of(x) if isinstance(x, Tensor) else x)


def zeros_like(shapes: object, device: torch.device) -> object:
    """Replace the shapes of a structure by tensors of zeros."""
    return map_tree(shapes, lambda x: x.zeros(device) if isinstance(x, TensorShape) else x)


class Boundaries:
    """Input shapes of all stages, by the shapes of a micro-batch and the trained parameters."""

    def __init__(
        self, model: nn.Module, stages: List[Stage], plan: Plan, mesh: Mesh, device: torch.device
    ) -> None:
        """Create the boundaries of an executor, which are found on first use."""
        self.parameters = list(model.parameters())
        self.stages = {stage.index: stage for stage in stages}
        self.plan = plan
        self.mesh = mesh
        self.device = device
        self._found: Dict[Hashable, List[List[TensorShape]]] = {}

    def key(self, micro_batch: object, training: bool) -> Hashable:
        """Return what the shapes depend on, the same on all ranks."""
        trained = tuple(p.requires_grad for p in self.parameters) if training else ()
        return trained, training, shape_key(micro_batch)

    def of(self, micro_batch: object, training: bool) -> List[List[TensorShape]]:
        """Return the input shapes of all stages; run them where they are not known.

        Raises:
            UserError: If the schedule cannot run a stage.
        """
        key = self.key(micro_batch, training)
        if key not in self._found:
            found = self._find(micro_batch)
            if training and SCHEDULES[self.plan.schedule].splits_backward:
                self._refuse_split(found, micro_batch)
            self._found[key] = found
        return self._found[key]

    def _find(self, micro_batch: object) -> List[List[TensorShape]]:
        boundaries: List[List[TensorShape]] = [[]]
        for index in range(self.plan.main.num_stages - 1):
            object_list: List[Any] = [None]
            if index in self.stages:
                incoming = [shape.zeros(self.device) for shape in boundaries[-1]]
                with dry_run(self.stages[index], micro_batch, self.device) as stage:
                    hidden = stage(*incoming, index=torch.tensor([0]))
                hidden = hidden if isinstance(hidden, tuple) else (hidden,)
                object_list = [[TensorShape.of(tensor) for tensor in hidden]]
            source = self.mesh.global_rank(self.plan.main.rank_of(index))
            dist.broadcast_object_list(object_list, source, self.mesh.pipeline_group)
            boundaries.append(object_list[0])
        return boundaries

    def _refuse_split(self, shapes: Sequence[Sequence[TensorShape]], micro_batch: object) -> None:
        """Raise an error on all ranks if the backward of a stage cannot be split."""
        own: List[Tuple[int, str]] = []
        for index, stage in self.stages.items():
            incoming = [shape.zeros(self.device) for shape in shapes[index]]
            with dry_run(stage, micro_batch, self.device):
                reason = why_not_split(stage, incoming)
            own += [(index, reason)] if reason else []
        parts: List[List[Tuple[int, str]]] = [[]] * dist.get_world_size(self.mesh.pipeline_group)
        dist.all_gather_object(parts, own, group=self.mesh.pipeline_group)
        for index, reason in sorted(found for part in parts for found in part):
            raise UserError(
                f"schedule={self.plan.schedule!r} cannot run stage {index} "
                f"({', '.join(self.plan.main.stages[index])}): {reason}. Use schedule='1f1b'."
            )


@contextmanager
def dry_run(stage: Stage, micro_batch: object, device: torch.device) -> Iterator[Stage]:
    """Let a stage run on a micro-batch in evaluation mode; restore random states and modes."""
    modes, call = {m: m.training for m in stage.modules()}, ScheduleCall([micro_batch], [1.0])
    stage.eval()
    try:
        with torch.random.fork_rng([device] if device.type != "cpu" else []), stage.in_call(call):
            yield stage
    finally:
        for module, training in modes.items():
            module.training = training
