"""Runs batches on the stages of a pipeline, over torch.distributed.pipelining."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import Any, Callable, Dict, Hashable, Iterator, List, Tuple

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
from lightning_ipu_bert.strategies.distributed.embeddings import rows_added_in_place
from lightning_ipu_bert.strategies.distributed.mesh import Mesh
from lightning_ipu_bert.strategies.distributed.stage import (
    Stage,
    TensorShape,
    hidden_shapes,
    shapes_of,
    zeros_like,
)

Boundaries = List[List[TensorShape]]
"""What comes into every stage."""


class TorchPipelineExecutor:
    """Runs a model's batches on stages; see `pipeline.protocol.PipelineExecutor`."""

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
            model: The whole model, of which this rank holds only its stages' parameters.
            stages: This rank's stages.
            plan: What the run follows.
            mesh: Where this rank is.
            device: Of this rank.
            seed: Of the random numbers drawn in stages (dropout).
            batches_done: Returns the batches trained on before this one, in a resumed run, too.
            loss_scale: Gives the factor of the loss while its gradients are computed.
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
        """The batch at hand, and how often its loss was computed."""
        self._boundaries: Dict[Hashable, Boundaries] = {}
        self._schedule: Tuple[Hashable, Any] = (None, None)

    @property
    def parameters(self) -> List[torch.nn.Parameter]:
        """The parameters of this rank's stages."""
        return [parameter for stage in self.stages for parameter in stage.parameters()]

    def loss(self, batch: Any) -> Tensor:
        """Return the mean loss; with gradients on, the stages run forward and backward now."""
        if not torch.is_grad_enabled():
            loss: Tensor = self.model.pipeline_loss(self.output(batch), batch)
            return loss
        scale = self.loss_scale()
        batch_index = self.batches_done()
        self._calls = (batch_index, self._calls[1] + 1 if self._calls[0] == batch_index else 1)
        with self._random_stream():
            total, gradients = take_gradients(self.parameters, lambda: self._train(batch, scale))
        return bridged(self._from_last_stage(total), gradients, scale)

    def output(self, batch: Any) -> Any:
        """Return the last block's output for the whole batch, on every rank of the replica."""
        with torch.no_grad():
            schedule, number = self._prepare(batch, training=False)
            index = torch.arange(number)
            schedule.eval(target=index, return_outputs=False, index=index)
            parts = [part for stage in self.stages for part in stage.outputs]
        for stage in self.stages:
            stage.outputs, stage.micro_batches = [], []
        return self._broadcast_output(join_outputs(parts) if parts else None)

    def _train(self, batch: Any, scale: float) -> Any:
        """Run the schedule; return the mean loss where the last stage is."""
        schedule, number = self._prepare(batch, training=True)
        losses: List[Tensor] = []
        for stage in self.stages:
            stage.loss_weight = scale * loss_weight(number)
        index = torch.arange(number)
        with rows_added_in_place([stage for stage in self.stages if stage.index == 0]):
            schedule.step(target=index, losses=losses, return_outputs=False, index=index)
        for stage in self.stages:
            stage.micro_batches = []
        return torch.stack([loss.detach() for loss in losses]).sum() / scale if losses else None

    def _prepare(self, batch: Any, training: bool) -> Tuple[Any, int]:
        """Cut a batch into micro-batches, and return a schedule for them and their number."""
        examples = count_examples(batch)
        planned = -(-examples // self.plan.main.batches.gradient_accumulation_steps)
        number, size = equal_micro_batches(examples, planned)
        micro_batches = split_batch(batch, examples, size)
        for stage in self.stages:
            stage.micro_batches = micro_batches
        # Stages exchange tensors of one shape: another shape needs another schedule.
        key = (training, number, shape_key(micro_batches[0]))
        if self._schedule[0] != key:
            boundaries = self._find_boundaries((training, shape_key(micro_batches[0])))
            self._schedule = (key, self._build(number, boundaries))
        return self._schedule[1], number

    def _find_boundaries(self, key: Hashable) -> Boundaries:
        """Return what comes into each stage; every stage runs once on zeros for a new shape."""
        if key in self._boundaries:
            return self._boundaries[key]
        mine = {stage.index: stage for stage in self.stages}
        boundaries: Boundaries = [[]]
        for index in range(self.plan.main.num_stages - 1):
            object_list: List[Any] = [None]
            if index in mine:
                object_list = [hidden_shapes(mine[index], boundaries[-1], self.device)]
            source = self.mesh.global_rank(self.plan.main.rank_of(index))
            dist.broadcast_object_list(object_list, source, self.mesh.pipeline_group)
            boundaries.append(object_list[0])
        self._boundaries[key] = boundaries
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
        """Return the last stage's number on every rank of the replica."""
        if value is None:
            value = torch.zeros((), device=self.device)
        value = value.float()  # of one type on all ranks, whatever the default type is
        dist.broadcast(value, self._last_rank, self.mesh.pipeline_group)
        return torch.as_tensor(value)

    def _broadcast_output(self, output: Any) -> Any:
        """Return the last stage's output on every rank of the replica."""
        object_list = [None if output is None else shapes_of(output)]
        dist.broadcast_object_list(object_list, self._last_rank, self.mesh.pipeline_group)
        if output is None:
            output = zeros_like(object_list[0], self.device)
        for tensor in tensors_of(output):
            dist.broadcast(tensor, self._last_rank, self.mesh.pipeline_group)
        return output

    @contextmanager
    def _random_stream(self) -> Iterator[None]:
        """Draw random numbers of this rank's own, and leave the generators as they were.

        Ranks of a replica must draw the same numbers elsewhere (the order of their data), but not
        the same dropout masks. The stream is made of seed, rank and step: a resumed run repeats it.
        """
        device, rank = self.device, dist.get_rank()
        own = random.Random(f"{self.seed} {rank} {sum(self._calls)}").getrandbits(63)
        with torch.random.fork_rng([device] if device.type != "cpu" else []):
            torch.manual_seed(own)
            yield


def loss_weight(num_micro_batches: int) -> float:
    """Return the share of a micro-batch in the loss of its batch, over which gradients accumulate.

    Micro-batches are of equal size, so that the mean over them is the mean over the examples;
    replicas are averaged in `gradients.average_gradients`.
    """
    return 1 / num_micro_batches


def build_schedule(plan: Plan, stages: List[Any], number: int) -> Any:
    """Return torch's schedule for `number` micro-batches.

    Ragged last batches and evaluation may have too few for the one of the plan; another one, which
    takes any number, runs them.
    """
    from torch.distributed.pipelining import schedules

    def given(loss: Tensor, _: Tensor) -> Tensor:
        return loss  # the last stage computes it

    pipeline = plan.main
    name = torch_class_of(plan.schedule, pipeline.num_stages, pipeline.ranks_per_replica, number)
    return vars(schedules)[name](
        stages if SCHEDULES[plan.schedule].takes_stage_list else stages[0],
        n_microbatches=number,
        loss_fn=given,
        scale_grads=False,
    )
