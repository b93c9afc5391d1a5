"""Executor of the stages of a pipeline, based on torch.distributed.pipelining."""

from __future__ import annotations

import random
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Hashable, Iterator, List, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ipu_bert.batch_trees import join_outputs, tensors_of
from lightning_ipu_bert.global_loss import loss_of
from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.pipeline.protocol import has_own_weights
from lightning_ipu_bert.strategies.bridge import bridged, take_gradients
from lightning_ipu_bert.strategies.distributed.boundaries import Boundaries, shapes_of, zeros_like
from lightning_ipu_bert.strategies.distributed.embeddings import accumulated_in_place
from lightning_ipu_bert.strategies.distributed.fingerprints import BatchComparison
from lightning_ipu_bert.strategies.distributed.mesh import Mesh
from lightning_ipu_bert.strategies.distributed.micro_batches import (
    least_size,
    loss_weights,
    mean_over_replicas,
    micro_batches_of,
)
from lightning_ipu_bert.strategies.distributed.stage import ScheduleCall, Stage
from lightning_ipu_bert.strategies.distributed.torch_schedule import build_schedule, chunked


class TorchPipelineExecutor:
    """Runs the stages of a model; see `pipeline.protocol.PipelineExecutor`."""

    def __init__(
        self,
        model: Any,
        stages: List[Stage],
        plan: Plan,
        mesh: Mesh,
        device: torch.device,
        seed: int,
        batches_done: Callable[[], int] = lambda: 0,
        loss_scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        """Create an executor.

        Args:
            model: The complete `PipelineModule`; parameters of stages on other ranks are meta
                tensors.
            stages: The stages on this rank.
            plan: The plan of the run.
            mesh: Mesh coordinates of this rank.
            device: Device of this rank.
            seed: Seed of random numbers drawn in stages (dropout).
            batches_done: Returns the number of batches trained so far, including resumed runs.
            loss_scale: Returns the loss scale.
        """
        self.model = model
        self.stages = stages
        self.plan = plan
        self.mesh = mesh
        self.device = device
        self.seed = seed
        self.loss_scale = loss_scale
        self.batches_done = batches_done
        self._least_size = least_size(model)  # of a micro-batch in training
        self._calls = (0, 0)
        """Index of the current batch, and how often its loss was computed."""
        self.boundaries = Boundaries(model, stages, plan, mesh, device)
        self.compare = BatchComparison(mesh.data_group, batches_done)
        self._schedule: Tuple[Hashable, object] = (None, None)

    @property
    def parameters(self) -> List[torch.nn.Parameter]:
        """The parameters of the stages on this rank."""
        return [parameter for stage in self.stages for parameter in stage.parameters()]

    def loss(self, batch: object) -> Tensor:
        """Return the loss; run all backwards, too, if gradients are enabled."""
        weighted = has_own_weights(self.model)
        if not torch.is_grad_enabled():
            return loss_of(self.model, self.output(batch), batch, weighted)
        self.compare(batch)
        scale = self.loss_scale()
        batch_index = self.batches_done()
        self._calls = (batch_index, self._calls[1] + 1 if self._calls[0] == batch_index else 1)
        with self._random_stream():
            total, gradients = take_gradients(self.parameters, lambda: self._train(batch, scale))
        return bridged(self._from_last_stage(total), gradients, scale)

    def output(self, batch: object) -> object:
        """Return the output of the last block for the batch, on every rank of the replica."""
        self.compare(batch)
        micro_batches = self._split(batch)
        call = ScheduleCall(micro_batches)
        with torch.no_grad():
            schedule = self._schedule_for(micro_batches, training=False)
            with self._stages_in(call):
                schedule.eval(**chunked(len(micro_batches)))
        return self._broadcast_output(join_outputs(call.outputs) if call.outputs else None)

    def _train(self, batch: object, scale: float) -> Any:
        """Run the schedule; return the loss on the rank of the last stage, else None."""
        micro_batches = self._split(batch, self._least_size)
        schedule = self._schedule_for(micro_batches, training=True)
        weights = loss_weights(self.model, micro_batches, self.mesh, self.device)
        call = ScheduleCall(micro_batches, [scale * weight for weight in weights])
        losses: List[Tensor] = []
        first = [stage for stage in self.stages if stage.index == 0]
        with self._stages_in(call), accumulated_in_place(first):
            schedule.step(losses=losses, **chunked(len(micro_batches)))
        if not losses:
            return None
        total = torch.stack([loss.detach() for loss in losses]).sum() / scale
        return mean_over_replicas(total, self.mesh)

    def _split(self, batch: object, least: int = 1) -> List[object]:
        return micro_batches_of(batch, self.plan.main.batches.gradient_accumulation_steps, least)

    @contextmanager
    def _stages_in(self, call: ScheduleCall) -> Iterator[None]:
        with ExitStack() as stack:
            for stage in self.stages:
                stack.enter_context(stage.in_call(call))
            yield

    def _schedule_for(self, micro_batches: Sequence[object], training: bool) -> Any:
        """Return the schedule for micro-batches; each shape of tensors needs another one."""
        key = (len(micro_batches), self.boundaries.key(micro_batches[0], training))
        if self._schedule[0] != key:
            shapes = self.boundaries.of(micro_batches[0], training)
            group, number = self.mesh.pipeline_group, len(micro_batches)
            schedule = build_schedule(self.plan, self.stages, shapes, number, self.device, group)
            self._schedule = (key, schedule)
        return self._schedule[1]

    @property
    def _last_rank(self) -> int:
        """Global rank of the last stage of this replica."""
        return self.mesh.global_rank(self.plan.main.ranks_per_replica - 1)

    def _from_last_stage(self, value: Any) -> Tensor:
        """Return a scalar of the last stage on every rank of the replica."""
        if value is None:
            value = torch.zeros((), device=self.device)
        value = value.float()  # the same dtype on all ranks, independent of the default dtype
        dist.broadcast(value, self._last_rank, self.mesh.pipeline_group)
        return torch.as_tensor(value)

    def _broadcast_output(self, output: object) -> object:
        """Return the output of the last stage on every rank of the replica."""
        object_list = [None if output is None else shapes_of(output)]
        dist.broadcast_object_list(object_list, self._last_rank, self.mesh.pipeline_group)
        if output is None:
            output = zeros_like(object_list[0], self.device)
        for tensor in tensors_of(output):
            dist.broadcast(tensor, self._last_rank, self.mesh.pipeline_group)
        return output

    @contextmanager
    def _random_stream(self) -> Iterator[None]:
        """Seed the generators per rank and step within the context, and restore them.

        Ranks of a replica must draw the same numbers elsewhere (the order of their data), but not
        the same dropout masks. A resumed run repeats the numbers.
        """
        device, rank = self.device, dist.get_rank()
        own = random.Random(f"{self.seed} {rank} {sum(self._calls)}").getrandbits(63)
        with torch.random.fork_rng([device] if device.type != "cpu" else []):
            torch.manual_seed(own)
            yield
