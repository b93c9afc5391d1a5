"""Executor of the stages of a pipeline, based on torch.distributed.pipelining."""

from __future__ import annotations

import random
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Hashable, Iterator, List, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ipu_bert.pipeline.batches import equal_micro_batches
from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.pipeline.protocol import PipelineModule
from lightning_ipu_bert.pipeline.schedules import SCHEDULES, torch_class_of
from lightning_ipu_bert.strategies.batch_trees import (
    count_examples,
    join_outputs,
    shape_key,
    split_batch,
    tensors_of,
)
from lightning_ipu_bert.strategies.bridge import bridged, take_gradients
from lightning_ipu_bert.strategies.distributed.embeddings import accumulated_in_place
from lightning_ipu_bert.strategies.distributed.mesh import Mesh
from lightning_ipu_bert.strategies.distributed.stage import (
    ScheduleCall,
    Stage,
    TensorShape,
    hidden_shapes,
    shapes_of,
    zeros_like,
)

Boundaries = List[List[TensorShape]]
"""Shapes of the input of every stage."""


class TorchPipelineExecutor:
    """Runs the stages of a model; see `pipeline.protocol.PipelineExecutor`."""

    def __init__(
        self,
        model: PipelineModule,
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
            model: The complete model; parameters of stages on other ranks are meta tensors.
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
        self._calls = (0, 0)
        """Index of the current batch, and how often its loss was computed."""
        self._boundaries: Dict[Hashable, Boundaries] = {}
        self._schedule: Tuple[Hashable, object] = (None, None)

    @property
    def parameters(self) -> List[torch.nn.Parameter]:
        """The parameters of the stages on this rank."""
        return [parameter for stage in self.stages for parameter in stage.parameters()]

    def loss(self, batch: object) -> Tensor:
        """Return the mean loss; run all backwards, too, if gradients are enabled."""
        if not torch.is_grad_enabled():
            loss: Tensor = self.model.pipeline_loss(self.output(batch), batch)
            return loss
        scale = self.loss_scale()
        batch_index = self.batches_done()
        self._calls = (batch_index, self._calls[1] + 1 if self._calls[0] == batch_index else 1)
        with self._random_stream():
            total, gradients = take_gradients(self.parameters, lambda: self._train(batch, scale))
        return bridged(self._from_last_stage(total), gradients, scale)

    def output(self, batch: object) -> object:
        """Return the output of the last block for the batch, on every rank of the replica."""
        micro_batches = self._split(batch)
        call = ScheduleCall(micro_batches)
        with torch.no_grad():
            schedule = self._schedule_for(micro_batches, training=False)
            with self._stages_in(call):
                schedule.eval(**chunked(len(micro_batches)))
        return self._broadcast_output(join_outputs(call.outputs) if call.outputs else None)

    def _train(self, batch: object, scale: float) -> Any:
        """Run the schedule; return the mean loss on the rank of the last stage, else None."""
        micro_batches = self._split(batch)
        schedule = self._schedule_for(micro_batches, training=True)
        call = ScheduleCall(micro_batches, scale * loss_weight(len(micro_batches)))
        losses: List[Tensor] = []
        first = [stage for stage in self.stages if stage.index == 0]
        with self._stages_in(call), accumulated_in_place(first):
            schedule.step(losses=losses, **chunked(len(micro_batches)))
        return torch.stack([loss.detach() for loss in losses]).sum() / scale if losses else None

    @contextmanager
    def _stages_in(self, call: ScheduleCall) -> Iterator[None]:
        with ExitStack() as stack:
            for stage in self.stages:
                stack.enter_context(stage.in_call(call))
            yield

    def _split(self, batch: object) -> List[object]:
        """Split a batch into micro-batches of equal size."""
        examples = count_examples(batch)
        planned = -(-examples // self.plan.main.batches.gradient_accumulation_steps)
        _, size = equal_micro_batches(examples, planned)
        return split_batch(batch, examples, size)

    def _schedule_for(self, micro_batches: Sequence[object], training: bool) -> Any:
        """Return the schedule for micro-batches; each shape of tensors needs another one."""
        shape = (training, shape_key(micro_batches[0]))
        key = (len(micro_batches), shape)
        if self._schedule[0] != key:
            if shape not in self._boundaries:
                self._boundaries[shape] = self._find_boundaries(micro_batches[0])
            self._schedule = (key, self._build(len(micro_batches), self._boundaries[shape]))
        return self._schedule[1]

    def _find_boundaries(self, micro_batch: object) -> Boundaries:
        """Return the input shapes of all stages, each of which runs once on zeros."""
        own = {stage.index: stage for stage in self.stages}
        boundaries: Boundaries = [[]]
        for index in range(self.plan.main.num_stages - 1):
            object_list: List[Any] = [None]
            if index in own:
                shapes = hidden_shapes(own[index], boundaries[-1], micro_batch, self.device)
                object_list = [shapes]
            source = self.mesh.global_rank(self.plan.main.rank_of(index))
            dist.broadcast_object_list(object_list, source, self.mesh.pipeline_group)
            boundaries.append(object_list[0])
        return boundaries

    def _build(self, number: int, boundaries: Boundaries) -> Any:
        from torch.distributed.pipelining import PipelineStage

        scalar = torch.zeros((), device=self.device, requires_grad=True)
        stages = [
            PipelineStage(
                stage,
                stage.index,
                self.plan.main.num_stages,
                self.device,
                input_args=tuple(shape.zeros(self.device) for shape in boundaries[stage.index]),
                output_args=(scalar,)
                if stage.is_last
                else tuple(shape.zeros(self.device) for shape in boundaries[stage.index + 1]),
                group=self.mesh.pipeline_group,
            )
            for stage in self.stages
        ]
        return build_schedule(self.plan, stages, number)

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


def loss_weight(num_micro_batches: int) -> float:
    """Return the weight of the loss of a micro-batch in the loss of its batch.

    Micro-batches have equal size, so that the mean over them is the mean over the examples;
    replicas are averaged in `gradients.average_gradients`.
    """
    return 1 / num_micro_batches


def chunked(num_micro_batches: int) -> Dict[str, object]:
    """Return the arguments of a call of a schedule.

    A schedule splits its tensor arguments into one chunk per micro-batch. The chunks of `index` are
    thus the indices of the micro-batches, from which a stage knows which one it runs. Without a
    `target` no loss would be computed; its value is not used.
    """
    index = torch.arange(num_micro_batches)
    return {"index": index, "target": index, "return_outputs": False}


def build_schedule(plan: Plan, stages: List[Any], number: int) -> Any:
    """Create the schedule for `number` micro-batches.

    Ragged last batches and evaluation may have fewer micro-batches than the schedule of the plan
    needs; they use a schedule that supports any number.
    """
    from torch.distributed.pipelining import schedules

    def given(loss: Tensor, _: Tensor) -> Tensor:
        return loss  # computed by the last stage

    pipeline = plan.main
    name = torch_class_of(plan.schedule, pipeline.num_stages, pipeline.ranks_per_replica, number)
    return vars(schedules)[name](
        stages if SCHEDULES[plan.schedule].takes_stage_list else stages[0],
        n_microbatches=number,
        loss_fn=given,
        scale_grads=False,
    )
