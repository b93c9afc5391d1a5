"""Runs batches on the stages of a pipeline, over torch.distributed.pipelining."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import Any, Callable, Dict, Hashable, Iterator, List, NamedTuple, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ipu_bert.pipeline.batches import equal_micro_batches
from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.pipeline.interface import PipelineModule
from lightning_ipu_bert.strategies.bridge import bridged, take_gradients
from lightning_ipu_bert.strategies.embeddings import rows_added_in_place
from lightning_ipu_bert.strategies.micro_batches import count_examples, shape_key, split_batch
from lightning_ipu_bert.strategies.stage import Stage, TensorShape, hidden_shapes

Boundaries = List[List[TensorShape]]
"""What comes into every stage."""


class Place(NamedTuple):
    """Where this rank stands in its replica."""

    pipeline_group: Any
    """The ranks of this replica, by position."""
    device: torch.device

    def rank_at(self, position: int) -> int:
        """Return the global rank of a position of this replica."""
        return int(dist.get_global_rank(self.pipeline_group, position))


class TorchPipelineExecutor:
    """Runs a model's batches on stages; see `pipeline.interface.PipelineExecutor`."""

    def __init__(
        self,
        model: PipelineModule,
        stages: List[Stage],
        config: PipelineConfig,
        place: Place,
        seed: int,
        loss_scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        """Create an executor.

        Args:
            model: The whole model, of which this rank holds only its stages' parameters.
            stages: This rank's stages.
            config: The plan.
            place: Where this rank stands.
            seed: Of the random numbers drawn in stages (dropout).
            loss_scale: Gives the factor of the loss while its gradients are computed.
        """
        self.model = model
        self.stages = stages
        self.config = config
        self.place = place
        self.seed = seed
        self.loss_scale = loss_scale
        self.steps = 0
        """Batches trained on since the run began; the strategy sets it on resuming."""
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
        self.steps += 1
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
        whole = [_join(parts) if parts else None]
        return self._broadcast_output(whole[0])

    def _train(self, batch: Any, scale: float) -> Any:
        """Run the schedule; return the mean loss where the last stage is."""
        schedule, number = self._prepare(batch, training=True)
        losses: List[Tensor] = []
        for stage in self.stages:
            stage.loss_factor = scale / number
        index = torch.arange(number)
        with rows_added_in_place([stage for stage in self.stages if stage.index == 0]):
            schedule.step(target=index, losses=losses, return_outputs=False, index=index)
        for stage in self.stages:
            stage.micro_batches = []
        return torch.stack([loss.detach() for loss in losses]).sum() / scale if losses else None

    def _prepare(self, batch: Any, training: bool) -> Tuple[Any, int]:
        """Cut a batch into micro-batches, and return a schedule for them and their number."""
        examples = count_examples(batch)
        planned = -(-examples // self.config.gradient_accumulation_steps)
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
        for index in range(self.config.num_stages - 1):
            box: List[Any] = [None]
            if index in mine:
                box = [hidden_shapes(mine[index], boundaries[-1], self.place.device)]
            source = self.place.rank_at(index % self.config.ranks_per_replica)
            dist.broadcast_object_list(box, source, self.place.pipeline_group)
            boundaries.append(box[0])
        self._boundaries[key] = boundaries
        return boundaries

    def _build(self, number: int, boundaries: Boundaries) -> Any:
        from torch.distributed.pipelining import PipelineStage

        device = self.place.device
        scalar = torch.zeros((), device=device, requires_grad=True)
        stages = [
            PipelineStage(
                stage,
                stage.index,
                self.config.num_stages,
                device,
                input_args=tuple(shape.zeros(device) for shape in boundaries[stage.index]),
                output_args=(scalar,)
                if stage.is_last
                else tuple(shape.zeros(device) for shape in boundaries[stage.index + 1]),
                group=self.place.pipeline_group,
            )
            for stage in self.stages
        ]
        return build_schedule(self.config, stages, number)

    def _from_last_stage(self, value: Any) -> Tensor:
        """Return the last stage's number on every rank of the replica."""
        if value is None:
            value = torch.zeros((), device=self.place.device)
        value = value.float()
        last = self.place.rank_at(self.config.ranks_per_replica - 1)
        dist.broadcast(value, last, self.place.pipeline_group)
        return torch.as_tensor(value)

    def _broadcast_output(self, output: Any) -> Any:
        """Return the last stage's output on every rank of the replica."""
        last = self.place.rank_at(self.config.ranks_per_replica - 1)
        leaves, structure = torch.utils._pytree.tree_flatten(output)
        box: List[Any] = [None]
        if output is not None:
            box = [([TensorShape.of(leaf) for leaf in leaves], structure)]
        dist.broadcast_object_list(box, last, self.place.pipeline_group)
        shapes, structure = box[0]
        if output is None:
            leaves = [shape.zeros(self.place.device) for shape in shapes]
        for leaf in leaves:
            dist.broadcast(leaf, last, self.place.pipeline_group)
        return torch.utils._pytree.tree_unflatten(leaves, structure)

    @contextmanager
    def _random_stream(self) -> Iterator[None]:
        """Draw random numbers of this rank's own, and leave the generators as they were.

        Ranks of a replica must draw the same numbers elsewhere (the order of their data), but not
        the same dropout masks. The stream is made of seed, rank and step: a resumed run repeats it.
        """
        device = self.place.device
        rank = dist.get_rank()
        own = random.Random(f"{self.seed} {rank} {self.steps}").getrandbits(63)
        with torch.random.fork_rng([device] if device.type != "cpu" else []):
            torch.manual_seed(own)
            yield


def build_schedule(config: PipelineConfig, stages: List[Any], number: int) -> Any:
    """Return torch's schedule for `number` micro-batches.

    A ragged last batch may have too few for the configured one; it is then run as gpipe, which
    takes any number.
    """
    from torch.distributed import pipelining
    from torch.distributed.pipelining import schedules

    def given(loss: Tensor, _: Tensor) -> Tensor:
        return loss  # the last stage computes it

    options: Dict[str, Any] = {"n_microbatches": number, "loss_fn": given, "scale_grads": False}
    rounds = max(1, number // config.ranks_per_replica)
    if config.schedule == "interleaved_1f1b" and number % rounds == 0:
        return pipelining.ScheduleInterleaved1F1B(stages, **options)
    if config.schedule == "zero_bubble" and number % rounds == 0:
        return schedules.ScheduleInterleavedZeroBubble(stages, **options)
    if config.stages_per_rank > 1 or config.schedule == "zero_bubble":
        return pipelining.ScheduleLoopedBFS(stages, **options)
    if config.schedule == "1f1b" and number >= config.num_stages:
        return pipelining.Schedule1F1B(stages[0], **options)
    return pipelining.ScheduleGPipe(stages[0], **options)


def _join(parts: List[Any]) -> Any:
    """Put the outputs of micro-batches together along the examples."""
    flat = [torch.utils._pytree.tree_flatten(part) for part in parts]
    joined = [
        torch.cat(leaves) if leaves[0].dim() else torch.stack(leaves).mean()
        for leaves in zip(*(leaves for leaves, _ in flat))
    ]
    return torch.utils._pytree.tree_unflatten(joined, flat[0][1])
