"""A stage for torch.distributed.pipelining: hidden states in, hidden states out."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Dict, Iterator, List, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_ipu_bert.global_loss import checked_loss, detached, no_loss
from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.strategies.distributed.hidden_states import HiddenStates
from lightning_ipu_bert.strategies.distributed.recomputation import Recomputation
from lightning_ipu_bert.strategies.pipelined import PipelinedModule


@dataclass
class ScheduleCall:
    """Inputs and outputs that the stages of a rank share during one call of a schedule."""

    micro_batches: Sequence[object]
    hidden_states: Sequence[HiddenStates]
    """What every stage receives."""
    size: int = 1
    """Examples of a micro-batch."""
    loss_weights: Sequence[float] = ()
    """Weight of the loss of every micro-batch in the gradient of the global batch, in training."""
    scale: float = 1.0
    """The loss scale, in training."""
    keeps_outputs: bool = True
    """Whether the outputs of the last stage are stored."""
    outputs: Dict[int, object] = field(default_factory=dict)
    """Detached outputs of the last stage, by micro-batch."""
    current: int = 0
    """The micro-batch that a stage of this rank runs."""
    stage: int = 0
    """The stage that runs it."""
    in_loss: bool = False
    """Whether it computes the loss."""


def parameters_outside_blocks(module: nn.Module, plan: Plan) -> List[nn.Parameter]:
    """Return the parameters in no block, which `pipeline_loss` may use."""
    inside = {id(p) for name in plan.blocks for p in module.get_submodule(name).parameters()}
    return [parameter for parameter in module.parameters() if id(parameter) not in inside]


class Stage(nn.Module):
    """Consecutive blocks of a model, run on one micro-batch at a time.

    Every rank has the full batch, so that stages exchange only hidden states. In training the last
    stage returns the loss, in evaluation a dummy.
    """

    def __init__(
        self, model: PipelinedModule, plan: Plan, index: int, device: torch.device
    ) -> None:
        """Create a stage.

        Args:
            model: The complete model.
            plan: The plan of the run.
            index: Index of the stage.
            device: Device of this rank.
        """
        super().__init__()
        self.device = device
        self.index = index
        self.is_last = index == plan.main.num_stages - 1
        self.names = plan.main.stages[index]
        self.blocks = nn.ModuleList(model.get_submodule(name) for name in self.names)
        if self.is_last:
            self.in_no_block = nn.ParameterList(parameters_outside_blocks(model, plan))
        recomputed = set(plan.layers) if plan.recompute else set()
        self._recomputation = Recomputation(
            [block for name, block in zip(self.names, self.blocks) if name in recomputed]
        )
        self._model = (model,)  # in a tuple, so that the model is not a submodule of the stage
        self._call = ScheduleCall((), ())

    @contextmanager
    def in_call(self, call: ScheduleCall) -> Iterator[None]:
        """Run micro-batches of a call within the context.

        Not an argument of `forward`: schedules only pass tensors through (torch before 2.13).
        """
        self._call = call
        try:
            yield
        finally:
            self._call = ScheduleCall((), ())

    def run(self, number: int, *hidden: Tensor) -> object:
        """Run the blocks on a micro-batch, by a single call of `stage_forward`.

        Args:
            number: Index of the micro-batch.
            hidden: Tensors of the previous stage.

        Returns:
            Input of the next block or, of the last stage, the output of the model.
        """
        call, model = self._call, self._model[0]
        call.current, call.stage, call.in_loss = number, self.index, False
        received = call.hidden_states[self.index].unpack(hidden)
        with self._recomputation.wrapped():
            return model.stage_forward(self.names, received, call.micro_batches[number])

    @override
    def forward(self, *hidden: Tensor, index: Tensor) -> object:
        """Run the blocks on a micro-batch, and the loss after the last one.

        Args:
            hidden: Tensors of the previous stage; empty for the first stage.
            index: [1], index of the micro-batch.
        """
        call, model, number = self._call, self._model[0], int(index)
        value = self.run(number, *hidden)
        if not self.is_last:
            return call.hidden_states[self.index + 1].pack(value, self.index, self.device)
        if call.keeps_outputs:
            call.outputs[number] = detached(value)
        if not torch.is_grad_enabled():
            return torch.zeros((), device=self.device)
        weight, call.in_loss = call.loss_weights[number] * call.scale, True
        if not weight:
            return no_loss(value)
        return checked_loss(model, value, call.micro_batches[number]) * weight
