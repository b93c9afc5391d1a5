"""What the micro-batches of an update share: weights in the type of the products, and gradients.

A pipeline runs many small micro-batches one after the other. Each would cast all weights again, and
add gradients as large as the weights to those before. Within `accumulating`, weights are cast once,
and inputs and gradients of linear layers are kept until they make one product of many rows.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import (
    Any,
    Callable,
    Dict,
    Hashable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
)

import torch
from torch import Tensor

from lightning_ipu_bert.ops.parts import linear_gradients

T = TypeVar("T")
ROWS = 4096
"""Rows that are kept for one product: more would take memory, and gain nothing."""


class Linear(NamedTuple):
    """Parameters of linear layers that are computed as one: their outputs are concatenated."""

    weights: Sequence[Tensor]
    """[D_out, D_in] each."""
    biases: Sequence[Tensor]
    """[D_out] each."""


class KeptRows(NamedTuple):
    """What the gradients of a linear layer are computed from."""

    linear: Linear
    gradients: List[Tensor]
    """[N, D_out] each."""
    inputs: List[Tensor]
    """[N, D_in] each."""

    def finish(self) -> None:
        """Add the gradients of the rows to those of the parameters, and forget the rows."""
        if not self.inputs:
            return
        needed = [p.requires_grad for p in (*self.linear.weights, *self.linear.biases)]
        products = linear_gradients(torch.cat(self.gradients), torch.cat(self.inputs), needed)
        for parameters, product in zip(self.linear, products):
            if product is not None:
                for parameter, part in zip(parameters, product.chunk(len(parameters))):
                    _add_gradient(parameter, part)
        self.gradients.clear()
        self.inputs.clear()


class Accumulation:
    """The state of an update."""

    def __init__(self) -> None:
        """Begin an update."""
        self._made: Dict[Tuple[int, Hashable], Tuple[Tensor, Any]] = {}
        self._kept: Dict[int, KeptRows] = {}

    def once(self, owner: Tensor, what: Hashable, make: Callable[[], T]) -> T:
        """Return what was made from a parameter in this update; make it the first time."""
        key = (id(owner), what)
        if key not in self._made:
            self._made[key] = (owner, make())  # the owner is kept: another one could get its id
        made: T = self._made[key][1]
        return made

    def add(self, linear: Linear, gradient: Tensor, x: Tensor) -> None:
        """Keep what the gradients of a linear layer are computed from.

        Args:
            linear: The parameters.
            gradient: [N, D_out], of the output; it must not be modified later.
            x: [N, D_in], likewise.
        """
        if not any(p.requires_grad for p in (*linear.weights, *linear.biases)):
            return
        kept = self._kept.setdefault(id(linear.weights[0]), KeptRows(linear, [], []))
        kept.gradients.append(gradient)
        kept.inputs.append(x)
        if sum(map(len, kept.inputs)) >= ROWS:
            kept.finish()

    def finish(self) -> None:
        """Add all gradients to those of the parameters."""
        for kept in self._kept.values():
            kept.finish()


_active: List[Accumulation] = []


def once(owner: Tensor, what: Hashable, make: Callable[[], T]) -> T:
    """Return what is made from a parameter: once an update within `accumulating`."""
    return _active[-1].once(owner, what, make) if _active else make()


def linear_backward(
    linear: Linear, gradient: Tensor, x: Tensor, needed: Sequence[object]
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Return the gradients of weight and bias, None for those that are not needed or added later.

    Args:
        linear: The parameters.
        gradient: [N, D_out], of the output; it must not be modified later.
        x: [N, D_in], likewise.
        needed: Whether any of each is needed.
    """
    if not _active or not all(p.is_leaf for p in (*linear.weights, *linear.biases)):
        return linear_gradients(gradient, x, needed)
    _active[-1].add(linear, gradient, x)
    return None, None


@contextmanager
def accumulating() -> Iterator[None]:
    """Share weights and products among the micro-batches that run forward and backward within.

    Parameters must not change within the context. Their gradients are complete when it is left, and
    are added to `grad` as by `Tensor.backward`; `torch.autograd.grad` does not see them.
    """
    update = Accumulation()
    _active.append(update)
    try:
        yield
        with torch.no_grad():
            update.finish()
    finally:
        _active.remove(update)


def _add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add a gradient to that of a parameter, as autograd does."""
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
    else:
        parameter.grad.add_(gradient)
