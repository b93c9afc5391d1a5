"""A stage for torch.distributed.pipelining: hidden states in, hidden states out."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.pipeline.protocol import PipelineModule
from lightning_ipu_bert.strategies.batch_trees import map_tree, tensors_of


@dataclass
class ScheduleCall:
    """Inputs and outputs that the stages of a rank share during one call of a schedule."""

    micro_batches: Sequence[object]
    loss_weight: float = 1.0
    """Weight of the loss of a micro-batch in the loss of the batch, times the loss scale."""
    outputs: List[object] = field(default_factory=list)
    """Outputs of the last stage in evaluation, appended in the order of micro-batches."""


class Stage(nn.Module):
    """Consecutive blocks of a model, run on one micro-batch at a time.

    Every rank has the full batch, so that stages exchange only hidden states. In training the last
    stage returns the loss; in evaluation it appends its output to the call and returns a dummy.
    """

    def __init__(self, model: PipelineModule, plan: Plan, index: int) -> None:
        """Create a stage.

        Args:
            model: The complete model.
            plan: The plan of the run.
            index: Index of the stage.
        """
        super().__init__()
        module: Any = model
        self.index = index
        self.is_last = index == plan.main.num_stages - 1
        self.names = plan.main.stages[index]
        self.blocks = nn.ModuleList(module.get_submodule(name) for name in self.names)
        recomputed = set(plan.layers) if plan.recompute else set()
        self._recomputed = [
            block for name, block in zip(self.names, self.blocks) if name in recomputed
        ]
        self._model = (model,)  # in a tuple, so that the model is not a submodule of the stage
        self._call = ScheduleCall(())

    @contextmanager
    def in_call(self, call: ScheduleCall) -> Iterator[None]:
        """Run micro-batches of a call within the context.

        Not an argument of `forward`: schedules only pass tensors through (torch before 2.13).
        """
        self._call = call
        try:
            yield
        finally:
            self._call = ScheduleCall(())

    @override
    def forward(self, *hidden: Tensor, index: Tensor) -> object:
        """Run the blocks on a micro-batch, by a single call of `stage_forward`.

        Args:
            hidden: Output of the previous stage; empty for the first stage.
            index: [1], index of the micro-batch.
        """
        model, batch = self._model[0], self._call.micro_batches[int(index)]
        value: object = None if not hidden else hidden[0] if len(hidden) == 1 else hidden
        with recomputed(self._recomputed if torch.is_grad_enabled() else []):
            value = model.stage_forward(self.names, value, batch)
        if not self.is_last:
            return value
        if torch.is_grad_enabled():
            return model.pipeline_loss(value, batch) * self._call.loss_weight
        self._call.outputs.append(value)
        return torch.zeros((), device=tensors_of(value)[0].device)


@contextmanager
def recomputed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Checkpoint the activations of layers within the context.

    Layers are wrapped within a call of `stage_forward`, which prepares masks and tables only once.
    """
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own):
            del layer.forward  # restores the method of the class
            if forward is not None:
                layer.forward = forward


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


def hidden_shapes(
    stage: Stage, incoming: Sequence[TensorShape], micro_batch: object, device: torch.device
) -> List[TensorShape]:
    """Run a stage once on zeros and return the shapes of its output.

    Random states and training modes are restored.

    Args:
        stage: The stage.
        incoming: Shapes of its input.
        micro_batch: A micro-batch of the shapes in question.
        device: Device of the stage.
    """
    modes = {module: module.training for module in stage.modules()}
    devices = [device] if device.type != "cpu" else []
    stage.eval()
    try:
        with torch.random.fork_rng(devices):
            zeros = [shape.zeros(device) for shape in incoming]
            with stage.in_call(ScheduleCall([micro_batch])):
                hidden = stage(*zeros, index=torch.tensor([0]))
    finally:
        for module, training in modes.items():
            module.training = training
    hidden = hidden if isinstance(hidden, tuple) else (hidden,)
    return [TensorShape.of(tensor) for tensor in hidden]
