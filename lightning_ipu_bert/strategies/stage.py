"""One stage as torch.distributed.pipelining runs it: hidden states in, hidden states out."""

from __future__ import annotations

from typing import Any, List, NamedTuple, Sequence, Set, Tuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ipu_bert.pipeline.interface import PipelineModule
from lightning_ipu_bert.pipeline.partition import find_layers

Hidden = Tuple[Tensor, ...]


class Stage(nn.Module):
    """Some consecutive blocks of a model, for one micro-batch at a time.

    Every rank has the whole batch, so between stages only hidden states travel. The last stage
    returns the loss while training; else it keeps its output, and returns nothing of use.
    """

    def __init__(self, model: PipelineModule, index: int, blocks: Sequence[str], recompute: bool):
        """Create a stage.

        Args:
            model: The whole model.
            index: Which stage this is.
            blocks: Names of its blocks.
            recompute: Compute the insides of layers again in the backward.
        """
        super().__init__()
        names = list(model.pipeline_blocks())
        layers = find_layers(names)
        recomputed = names[layers.first : layers.first + layers.number] if recompute else []
        module: Any = model
        self.blocks = nn.ModuleList(module.get_submodule(name) for name in blocks)
        self.index = index
        self.is_last = blocks[-1] == names[-1]
        self._model = (model,)  # in a tuple: the whole model is no part of the stage
        self._runs = _runs(blocks, set(recomputed))
        self.micro_batches: List[Any] = []
        self.outputs: List[Any] = []
        self.loss_factor = 1.0
        """Share of a micro-batch in the batch's loss, times the loss scale."""

    def forward(self, *hidden: Tensor, index: Tensor) -> Any:
        """Run the blocks on micro-batch `index`."""
        model, batch = self._model[0], self.micro_batches[int(index)]
        value: Any = None if not hidden else hidden[0] if len(hidden) == 1 else hidden
        for blocks, recompute in self._runs:
            if recompute and torch.is_grad_enabled():
                value = checkpoint(model.stage_forward, blocks, value, batch, use_reentrant=False)
            else:
                value = model.stage_forward(blocks, value, batch)
        if not self.is_last:
            return value
        if torch.is_grad_enabled():
            return model.pipeline_loss(value, batch) * self.loss_factor
        self.outputs.append(value)
        return torch.zeros((), device=next(iter(_tensors(value))).device)


def _runs(blocks: Sequence[str], recomputed: Set[str]) -> List[Tuple[List[str], bool]]:
    """Part the blocks into those that are recomputed, one by one, and runs of others."""
    runs: List[Tuple[List[str], bool]] = []
    for block in blocks:
        if block in recomputed:
            runs.append(([block], True))
        elif runs and not runs[-1][1]:
            runs[-1][0].append(block)
        else:
            runs.append(([block], False))
    return runs


def _tensors(value: Any) -> List[Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


class TensorShape(NamedTuple):
    """What a stage must know of a tensor before it comes."""

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
