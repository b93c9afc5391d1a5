"""Weights of micro-batches as an input of the training program.

PopTorch averages the gradients of the micro-batches of a weight update. Their losses are multiplied
by factors, of which each micro-batch receives its own, so that they count by `batch_weight`.
"""

from __future__ import annotations

from typing import List, Optional, Sequence

import torch
from torch import Tensor

from lightning_ipu_bert._compat.torch import without_torch_function
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.examples import split_batch
from lightning_ipu_bert.pipeline.batches import BatchAlgebra
from lightning_ipu_bert.pipeline.protocol import PipelineModule


class LossWeights:
    """Computes the factors of a call, and replaces micro-batches without weight."""

    def __init__(self, module: PipelineModule, batches: BatchAlgebra) -> None:
        """Create the weights of a module that overrides `batch_weight`.

        Args:
            module: The module.
            batches: The batch algebra of the training program.
        """
        self.module = module
        self.batches = batches
        self._substitute: Optional[List[Tensor]] = None
        """Tensors of a micro-batch that has a weight."""

    def inputs(self, batch: object, tensors: Sequence[Tensor]) -> List[Tensor]:
        """Return the inputs of the program for a batch: its tensors, and the factors.

        The loss of a micro-batch without weight may be NaN (a mean over no label), and NaN times 0
        is NaN. Another micro-batch takes its place, with factor 0.

        Args:
            batch: The batch of a call.
            tensors: Its tensors, of shape [examples, ...].

        Raises:
            UserError: If no micro-batch so far has a weight.
        """
        count = self.batches.micro_batches_per_call
        size = len(tensors[0]) // count
        parts = split_batch(batch, len(tensors[0]), size)
        with without_torch_function():  # buffers of PopTorch would fetch all weights
            weights = torch.tensor([float(self.module.batch_weight(part)) for part in parts])
        per_update = weights.reshape(self.batches.device_iterations, -1)
        totals = per_update.sum(1, keepdim=True)
        means = torch.where(totals > 0, totals / per_update.shape[1], torch.ones(1))
        return [*self._replaced(tensors, weights, size), (per_update / means).reshape(-1)]

    def _replaced(self, tensors: Sequence[Tensor], weights: Tensor, size: int) -> List[Tensor]:
        """Return tensors without micro-batches that have no weight."""
        best = int(weights.argmax())
        if weights[best] > 0:
            rows = slice(best * size, (best + 1) * size)
            self._substitute = [tensor[rows].clone() for tensor in tensors]
        empty = [index for index, weight in enumerate(weights.tolist()) if not weight]
        if not empty:
            return list(tensors)
        if self._substitute is None:
            raise UserError(
                "No micro-batch of the first training batch has a weight, so the program has "
                "nothing to run in their place. Leave out examples without a label."
            )
        replaced = [tensor.clone() for tensor in tensors]
        for tensor, substitute in zip(replaced, self._substitute):
            for index in empty:
                tensor[index * size : (index + 1) * size] = substitute
        return replaced
