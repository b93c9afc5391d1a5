"""What stages exchange, found by running every stage once."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Dict, Hashable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import nn

from lightning_ipu_bert.batch_trees import shape_key
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.pipeline.schedules import SCHEDULES
from lightning_ipu_bert.strategies.distributed.hidden_states import HiddenStates
from lightning_ipu_bert.strategies.distributed.logged import unlogged
from lightning_ipu_bert.strategies.distributed.mesh import Mesh
from lightning_ipu_bert.strategies.distributed.recomputation import BuffersUnchanged
from lightning_ipu_bert.strategies.distributed.split_backward import why_not_split
from lightning_ipu_bert.strategies.distributed.stage import ScheduleCall, Stage


class Boundaries:
    """Hidden states of all stages, by the shapes of a micro-batch and the trained parameters."""

    def __init__(
        self, model: nn.Module, stages: List[Stage], plan: Plan, mesh: Mesh, device: torch.device
    ) -> None:
        """Create the boundaries of an executor, which are found on first use."""
        self.model = model
        self.parameters = list(model.parameters())
        self.stages = {stage.index: stage for stage in stages}
        self.plan = plan
        self.mesh = mesh
        self.device = device
        self._found: Dict[Hashable, List[HiddenStates]] = {}

    def key(self, micro_batch: object, training: bool) -> Hashable:
        """Return what the shapes depend on, the same on all ranks."""
        trained: Tuple[bool, ...] = ()
        if training:
            trained = tuple(parameter.requires_grad for parameter in self.parameters)
        return trained, training, shape_key(micro_batch)

    def of(self, micro_batch: object, training: bool) -> List[HiddenStates]:
        """Return what all stages receive; run them where it is not known.

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

    def output(self, stage: Stage, micro_batch: object) -> object:
        """Return the output of the last stage for zeros."""
        found = self.of(micro_batch, training=False)
        with self._dry_run(stage, micro_batch, found):
            return stage.run(0, *found[stage.index].zeros(self.device))

    def _find(self, micro_batch: object) -> List[HiddenStates]:
        found = [HiddenStates(is_input=True)]
        for index in range(self.plan.main.num_stages - 1):
            object_list: List[Optional[HiddenStates]] = [None]
            if index in self.stages:
                with self._dry_run(self.stages[index], micro_batch, found) as stage:
                    value = stage.run(0, *found[index].zeros(self.device))
                object_list = [HiddenStates.of(value, index)]
            source = self.mesh.global_rank(self.plan.main.rank_of(index))
            dist.broadcast_object_list(object_list, source, self.mesh.pipeline_group)
            assert object_list[0] is not None
            found.append(object_list[0])
        return found

    def _refuse_split(self, found: Sequence[HiddenStates], micro_batch: object) -> None:
        """Raise an error on all ranks if the backward of a stage cannot be split."""
        own: List[Tuple[int, str]] = []
        for index, stage in self.stages.items():
            with self._dry_run(stage, micro_batch, found):
                reason = why_not_split(stage, found[index].zeros(self.device))
            own += [(index, reason)] if reason else []
        parts: List[List[Tuple[int, str]]] = [[]] * dist.get_world_size(self.mesh.pipeline_group)
        dist.all_gather_object(parts, own, group=self.mesh.pipeline_group)
        for index, reason in sorted(found for part in parts for found in part):
            raise UserError(
                f"schedule={self.plan.schedule!r} cannot run stage {index} "
                f"({', '.join(self.plan.main.stages[index])}): {reason}. Use schedule='1f1b'."
            )

    @contextmanager
    def _dry_run(
        self, stage: Stage, micro_batch: object, found: Sequence[HiddenStates]
    ) -> Iterator[Stage]:
        """Let a stage run on a micro-batch in evaluation mode, without a trace.

        Random states, modes and buffers are restored.
        """
        modes = {module: module.training for module in stage.modules()}
        call = ScheduleCall([micro_batch], found, loss_weights=[1.0])
        devices = [self.device] if self.device.type != "cpu" else []
        kept, unchanged = torch.random.fork_rng(devices), BuffersUnchanged(stage)
        stage.eval()
        try:
            with kept, unchanged, stage.in_call(call), unlogged(self.model):
                yield stage
        finally:
            for module, training in modes.items():
                module.training = training
