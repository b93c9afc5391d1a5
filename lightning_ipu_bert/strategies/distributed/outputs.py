"""Outputs of the last stage, on every rank of a replica."""

from __future__ import annotations

from typing import Callable, Dict, List, Sequence, Tuple

import torch
import torch.distributed as dist

from lightning_ipu_bert.batch_trees import tensors_of
from lightning_ipu_bert.examples import changed_dims, example_dims, join_outputs
from lightning_ipu_bert.strategies.distributed.hidden_states import shapes_of, zeros_like
from lightning_ipu_bert.strategies.distributed.mesh import Mesh


class OutputExchange:
    """Joins the outputs of micro-batches on the last stage, and broadcasts them."""

    def __init__(self, mesh: Mesh, last_rank: int, device: torch.device) -> None:
        """Create the exchange.

        Args:
            mesh: Mesh coordinates and groups of this rank.
            last_rank: Global rank of the last stage of this replica.
            device: Device of this rank.
        """
        self._group = mesh.pipeline_group
        self._last_rank = last_rank
        self._device = device
        self._dims: Dict[Tuple[int, ...], List[int]] = {}
        """The dimension of the examples in each tensor, by their numbers of dimensions."""

    def everywhere(
        self,
        outputs: Sequence[object],
        examples: int,
        other_output: Callable[[], object],
    ) -> object:
        """Return the joined output on every rank of the replica; all of them must call it.

        Args:
            outputs: Outputs of the micro-batches, on the rank of the last stage.
            examples: Examples of a micro-batch.
            other_output: Runs all stages on a micro-batch with another number of examples and
                returns the output, on the rank of the last stage. Called on all ranks if the
                dimension of the examples is ambiguous.
        """
        is_known = torch.tensor(not outputs or self._find_dims(outputs[0], examples))
        is_known = is_known.to(self._device, torch.uint8)
        dist.broadcast(is_known, self._last_rank, self._group)
        if not is_known:
            other = other_output()
            if outputs:
                self._dims[_key(outputs[0])] = changed_dims(outputs[0], other)
        joined = join_outputs(outputs, self._dims[_key(outputs[0])]) if outputs else None
        object_list: List[object] = [shapes_of(joined)]
        dist.broadcast_object_list(object_list, self._last_rank, self._group)
        output = joined if outputs else zeros_like(object_list[0], self._device)
        for tensor in tensors_of(output):
            dist.broadcast(tensor, self._last_rank, self._group)
        return output

    def _find_dims(self, output: object, examples: int) -> bool:
        """Return whether the dimensions of the examples are known, or their sizes show them."""
        key, tensors = _key(output), tensors_of(output)
        if key in self._dims and all(
            not tensor.dim() or tensor.shape[dim] == examples
            for tensor, dim in zip(tensors, self._dims[key])
        ):
            return True
        found = example_dims(output, examples)
        if found is not None:
            self._dims[key] = found
        return found is not None


def _key(output: object) -> Tuple[int, ...]:
    return tuple(tensor.dim() for tensor in tensors_of(output))
