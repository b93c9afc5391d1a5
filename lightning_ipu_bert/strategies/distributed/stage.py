"""A stage for torch.distributed.pipelining: hidden states in, hidden states out."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ContextManager, Dict, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_ipu_bert.batch_trees import tensors_of
from lightning_ipu_bert.global_loss import no_loss
from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.pipeline.protocol import PipelineModule


@dataclass
class ScheduleCall:
    """Inputs and outputs that the stages of a rank share during one call of a schedule."""

    micro_batches: Sequence[object]
    loss_weights: Sequence[float] = ()
    """Weight of the loss of every micro-batch in the gradient of the global batch, in training."""
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
        model, number = self._model[0], int(index)
        batch = self._call.micro_batches[number]
        value: object = None if not hidden else hidden[0] if len(hidden) == 1 else hidden
        with recomputed(self._recomputed if torch.is_grad_enabled() else []):
            value = model.stage_forward(self.names, value, batch)
        if not self.is_last:
            return value
        if torch.is_grad_enabled():
            weight = self._call.loss_weights[number]
            return model.pipeline_loss(value, batch) * weight if weight else no_loss(value)
        self._call.outputs.append(value)
        return torch.zeros((), device=tensors_of(value)[0].device)


@contextmanager
def recomputed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Checkpoint the activations of layers within the context.

    Layers are wrapped within a call of `stage_forward`, which prepares masks and tables only once.
    """

    def contexts(layer: nn.Module) -> Tuple[ContextManager[None], BuffersUnchanged]:
        return nullcontext(), BuffersUnchanged(layer)

    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, context_fn=partial(contexts, layer)
        )
    try:
        yield
    finally:
        for layer, forward in zip(layers, own):
            del layer.forward  # restores the method of the class
            if forward is not None:
                layer.forward = forward


class BuffersUnchanged:
    """Context that runs a layer on copies of its buffers.

    The recomputation of BatchNorm must not update its statistics again. Copies, because the graph
    of the first run may hold the buffers themselves. A split backward enters it twice.
    """

    def __init__(self, layer: nn.Module) -> None:
        """Create the context for a layer."""
        self._owners = [part for part in layer.modules() if list(part.buffers(recurse=False))]
        self._kept: List[Dict[str, Tensor]] = []

    def __enter__(self) -> None:
        """Replace the buffers by copies."""
        self._kept = [dict(owner.named_buffers(recurse=False)) for owner in self._owners]
        for owner, kept in zip(self._owners, self._kept):
            for name, buffer in kept.items():
                setattr(owner, name, buffer.clone())

    def __exit__(self, *_: object) -> None:
        """Restore the buffers."""
        for owner, kept in zip(self._owners, self._kept):
            for name, buffer in kept.items():
                setattr(owner, name, buffer)
