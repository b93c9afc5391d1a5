"""One stage as torch.distributed.pipelining runs it: hidden states in, hidden states out."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.pipeline.protocol import PipelineModule
from lightning_ipu_bert.strategies.batch_trees import map_tree, tensors_of


class Stage(nn.Module):
    """Some consecutive blocks of a model, for one micro-batch at a time.

    Every rank has the whole batch, so that only hidden states travel between stages. The last stage
    returns the loss in training; else it keeps its output and returns nothing of use.
    """

    def __init__(self, model: PipelineModule, plan: Plan, index: int) -> None:
        """Create a stage.

        Args:
            model: The whole model.
            plan: What the stage holds, and whether its layers are recomputed.
            index: Which stage this is.
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
        self._model = (model,)  # in a tuple: the whole model is no submodule of the stage
        self.micro_batches: List[Any] = []
        self.outputs: List[Any] = []
        self.loss_weight = 1.0
        """Share of a micro-batch in the batch's loss, times the loss scale."""

    @override
    def forward(self, *hidden: Tensor, index: Tensor) -> Any:
        """Run the blocks on micro-batch `index`, by one call of the model's `stage_forward`."""
        model, batch = self._model[0], self.micro_batches[int(index)]
        value: Any = None if not hidden else hidden[0] if len(hidden) == 1 else hidden
        with recomputed(self._recomputed if torch.is_grad_enabled() else []):
            value = model.stage_forward(self.names, value, batch)
        if not self.is_last:
            return value
        if torch.is_grad_enabled():
            return model.pipeline_loss(value, batch) * self.loss_weight
        self.outputs.append(value)
        return torch.zeros((), device=tensors_of(value)[0].device)


@contextmanager
def recomputed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let layers keep only their inputs, and recompute their activations in the backward.

    The layers are wrapped inside one call of the model, which prepares masks and tables once.
    """
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own):
            del layer.forward  # the class's own shows again
            if forward is not None:
                layer.forward = forward


@dataclass(frozen=True)
class TensorShape:
    """What a rank must know of a tensor before it comes."""

    shape: Tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> TensorShape:
        """Describe a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    def zeros(self, device: torch.device) -> Tensor:
        """Return a tensor of this kind."""
        zeros = torch.zeros(self.shape, dtype=self.dtype, device=device)
        return zeros.requires_grad_(self.requires_grad)


def shapes_of(value: Any) -> Any:
    """Return the same structure with shapes in the place of tensors."""
    return map_tree(value, lambda x: TensorShape.of(x) if isinstance(x, Tensor) else x)


def zeros_like(shapes: Any, device: torch.device) -> Any:
    """Return the same structure with tensors in the place of shapes."""
    return map_tree(shapes, lambda x: x.zeros(device) if isinstance(x, TensorShape) else x)


def hidden_shapes(
    stage: Stage, incoming: Sequence[TensorShape], device: torch.device
) -> List[TensorShape]:
    """Run a stage once on zeros, and return the shapes of what it gives to the next one.

    Nothing of it remains: random numbers, modes and buffers are as before.
    """
    modes = {module: module.training for module in stage.modules()}
    devices = [device] if device.type != "cpu" else []
    stage.eval()
    try:
        with torch.random.fork_rng(devices):
            hidden = stage(*(shape.zeros(device) for shape in incoming), index=torch.tensor([0]))
    finally:
        for module, training in modes.items():
            module.training = training
    hidden = hidden if isinstance(hidden, tuple) else (hidden,)
    return [TensorShape.of(tensor) for tensor in hidden]
