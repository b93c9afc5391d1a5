"""Executor of the stages of a pipeline, based on torch.distributed.pipelining."""

from __future__ import annotations

import random
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Callable, Dict, Hashable, Iterator, List, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_ipu_bert.examples import EntryMemo
from lightning_ipu_bert.global_loss import loss_of
from lightning_ipu_bert.ops.accumulation import accumulating
from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.pipeline.protocol import has_own_weights
from lightning_ipu_bert.strategies.bridge import bridged, take_gradients
from lightning_ipu_bert.strategies.distributed.boundaries import Boundaries
from lightning_ipu_bert.strategies.distributed.embeddings import accumulated_in_place
from lightning_ipu_bert.strategies.distributed.fingerprints import BatchComparison
from lightning_ipu_bert.strategies.distributed.logged import LoggedValues
from lightning_ipu_bert.strategies.distributed.mesh import Mesh
from lightning_ipu_bert.strategies.distributed.micro_batches import (
    MicroBatches,
    least_size,
    loss_weights,
    micro_batches_of,
    of_other_size,
)
from lightning_ipu_bert.strategies.distributed.outputs import OutputExchange
from lightning_ipu_bert.strategies.distributed.stage import ScheduleCall, Stage
from lightning_ipu_bert.strategies.distributed.torch_schedule import build_schedule, chunked
from lightning_ipu_bert.strategies.pipelined import PipelinedModule

SCHEDULES_KEPT = 4
"""Schedules with their buffers: training and evaluation, and alternating sets of parameters."""


def no_executor() -> None:
    """Return the executor of a model that was pickled: none."""


class TorchPipelineExecutor:
    """Runs the stages of a model; see `pipeline.protocol.PipelineExecutor`."""

    def __init__(
        self,
        model: PipelinedModule,
        plan: Plan,
        mesh: Mesh,
        device: torch.device,
        seed: int,
        batches_done: Callable[[], int] = lambda: 0,
        loss_scale: Callable[[], float] = lambda: 1.0,
        copied: Callable[[PipelinedModule], None] = lambda model: None,
    ) -> None:
        """Create an executor.

        Args:
            model: The complete `PipelineModule`; parameters of stages on other ranks are meta
                tensors.
            plan: The plan of the run.
            mesh: Mesh coordinates of this rank.
            device: Device of this rank.
            seed: Seed of random numbers drawn in stages (dropout).
            batches_done: Returns the number of batches trained so far, including resumed runs.
            loss_scale: Returns the loss scale.
            copied: Called with a copy of the model, which has an executor of its own.
        """
        self.model = model
        self.plan = plan
        self.mesh = mesh
        self.device = device
        self.seed = seed
        self.loss_scale = loss_scale
        self.batches_done = batches_done
        self.copied = copied
        self._calls = (0, 0)
        """Index of the current batch, and how often its loss was computed."""
        self.compare = BatchComparison(mesh.data_group, batches_done)
        last_rank = mesh.global_rank(plan.main.ranks_per_replica - 1)
        self._outputs = OutputExchange(mesh, last_rank, device)
        self._entries: EntryMemo = {}
        self._schedules: Dict[Hashable, object] = {}

    # Lazily, because a copy of the model is incomplete when its executor is copied.

    @cached_property
    def stages(self) -> List[Stage]:
        """The stages on this rank."""
        indices = self.plan.main.stages_on(self.mesh.pipeline_rank)
        return [Stage(self.model, self.plan, index, self.device) for index in indices]

    @cached_property
    def boundaries(self) -> Boundaries:
        """What stages exchange."""
        return Boundaries(self.model, self.stages, self.plan, self.mesh, self.device)

    @cached_property
    def _least_size(self) -> int:
        """Least size of a micro-batch in training."""
        return least_size(self.model)

    def __deepcopy__(self, memo: Dict[int, Any]) -> Optional[TorchPipelineExecutor]:
        """Return an executor for the copy of the model, or None if it is not copied."""
        model = memo.get(id(self.model))
        if model is None:
            return None
        self.copied(model)
        more = (self.seed, self.batches_done, self.loss_scale, self.copied)
        return TorchPipelineExecutor(model, self.plan, self.mesh, self.device, *more)

    @override
    def __reduce__(self) -> Tuple[Callable[[], None], Tuple[()]]:
        """Return what a pickled model has instead: it runs all blocks in one process."""
        return no_executor, ()

    @property
    def parameters(self) -> List[torch.nn.Parameter]:
        """The parameters of the stages on this rank."""
        return [parameter for stage in self.stages for parameter in stage.parameters()]

    def loss(self, batch: object) -> Tensor:
        """Return the loss; run all backwards, too, if gradients are enabled."""
        return self._loss(batch, keeps_outputs=False)[0]

    def loss_and_output(self, batch: object) -> Tuple[Tensor, object]:
        """Return the loss, as `loss` does, and the detached output for the batch."""
        return self._loss(batch, keeps_outputs=True)

    def _loss(self, batch: object, keeps_outputs: bool) -> Tuple[Tensor, object]:
        if not torch.is_grad_enabled():
            output = self.output(batch)
            return loss_of(self.model, output, batch, has_own_weights(self.model)), output
        self.compare(batch)
        scale = self.loss_scale()
        batch_index = self.batches_done()
        self._calls = (batch_index, self._calls[1] + 1 if self._calls[0] == batch_index else 1)
        micro_batches = self._split(batch, self._least_size)
        schedule, call = self._prepared(micro_batches, training=True)
        call.keeps_outputs = keeps_outputs
        call.loss_weights = loss_weights(self.model, micro_batches, self.mesh, self.device)
        call.scale = scale
        with self._random_stream():
            total, gradients = take_gradients(
                self.parameters, lambda: self._train(schedule, call, scale)
            )
        output = self._everywhere(call, micro_batches, batch) if keeps_outputs else None
        return bridged(total, gradients, scale), output

    def output(self, batch: object) -> object:
        """Return the output of the last block for the batch, on every rank of the replica."""
        self.compare(batch)
        micro_batches = self._split(batch)
        with torch.no_grad():
            schedule, call = self._prepared(micro_batches, training=False)
            with self._stages_in(call):
                schedule.eval(**chunked(len(micro_batches.parts)))
            return self._everywhere(call, micro_batches, batch)

    def _train(self, schedule: Any, call: ScheduleCall, scale: float) -> Tensor:
        """Run the schedule, log what stages log, and return the loss of the global batch."""
        losses: List[Tensor] = []
        logged = LoggedValues(call)
        first = [stage for stage in self.stages if stage.index == 0]
        with ExitStack() as stack:
            stack.enter_context(self._stages_in(call))
            stack.enter_context(logged.collected_from(self.model))
            stack.enter_context(accumulated_in_place(first))
            stack.enter_context(accumulating())
            schedule.step(losses=losses, **chunked(len(call.micro_batches)))
        total, is_logged = self._add_up(losses, scale, len(logged))
        if is_logged:
            logged.log_everywhere(self.model, self.plan.main.batches.replication_factor)
        return total

    def _add_up(self, losses: List[Tensor], scale: float, logged: int) -> Tuple[Tensor, bool]:
        """Return the loss of the global batch, and whether any rank has logged a value."""
        both = torch.zeros(2, device=self.device)  # float32 on all ranks, by any default dtype
        if losses:
            both[0] = torch.stack([loss.detach() for loss in losses]).sum() / scale
            both[0] /= dist.get_world_size(self.mesh.replica_group)
        both[1] = logged
        dist.all_reduce(both)
        return both[0], bool(both[1])

    def _everywhere(self, call: ScheduleCall, micro_batches: MicroBatches, batch: object) -> object:
        """Return the output for the batch on every rank of the replica."""
        last = [stage for stage in self.stages if stage.is_last]

        def other_output() -> object:
            other = of_other_size(micro_batches, batch, self._entries)
            self.boundaries.of(other, training=False)
            return self.boundaries.output(last[0], other) if last else None

        with torch.no_grad():
            outputs = [call.outputs[number] for number in sorted(call.outputs)]
            return self._outputs.everywhere(outputs, micro_batches.size, other_output)

    def _split(self, batch: object, least: int = 1) -> MicroBatches:
        steps = self.plan.main.batches.gradient_accumulation_steps
        return micro_batches_of(batch, steps, least, self._entries)

    @contextmanager
    def _stages_in(self, call: ScheduleCall) -> Iterator[None]:
        with ExitStack() as stack:
            for stage in self.stages:
                stack.enter_context(stage.in_call(call))
            yield

    def _prepared(self, micro_batches: MicroBatches, training: bool) -> Tuple[Any, ScheduleCall]:
        """Return the schedule for micro-batches of these shapes, and a call of it."""
        parts, size = micro_batches
        hidden_states = self.boundaries.of(parts[0], training)
        key = (len(parts), self.boundaries.key(parts[0], training))
        if key not in self._schedules:
            while len(self._schedules) >= SCHEDULES_KEPT:
                del self._schedules[next(iter(self._schedules))]
            group, number = self.mesh.pipeline_group, len(parts)
            self._schedules[key] = build_schedule(
                self.plan, self.stages, hidden_states, number, self.device, group
            )
        return self._schedules[key], ScheduleCall(parts, hidden_states, size)

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
