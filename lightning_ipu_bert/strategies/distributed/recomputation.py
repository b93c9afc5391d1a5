"""Recomputation of layers (PyTorch's activation checkpointing)."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Callable, ContextManager, Dict, Iterator, List, Mapping, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ipu_bert._compat.torch import plain_version, replaced_call
from lightning_ipu_bert.batch_trees import map_tree, tensors_of


class Recomputation:
    """Recomputes the activations of layers in the backward pass, instead of storing them."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Create an object that wraps nothing yet.

        Args:
            layers: The layers that are recomputed.
        """
        self._layers = layers
        self._modifies_input: Dict[nn.Module, bool] = {}
        """By layer that has been trained: the others might modify their input in place."""

    @contextmanager
    def wrapped(self) -> Iterator[None]:
        """Recompute the layers that run within the context, if gradients are enabled.

        Layers are wrapped within a call of `stage_forward`, which prepares masks and tables only
        once.
        """
        with ExitStack() as undo:
            for layer in self._layers if torch.is_grad_enabled() else []:
                undo.enter_context(replaced_call(layer, partial(self._run, layer)))
            yield

    def _run(
        self, layer: nn.Module, forward: Callable[..., object], *args: object, **kwargs: object
    ) -> object:
        """Run a layer, on copies of its input if it modifies it: it must be there a second time."""
        copies = self._modifies_input.get(layer, True)

        def run(args: Sequence[object], kwargs: Mapping[str, object]) -> object:
            if copies:
                args = [copied(value) for value in args]
                kwargs = {name: copied(value) for name, value in kwargs.items()}
            tensors = tensors_of([*args, *kwargs.values()])
            before = [plain_version(tensor) for tensor in tensors]
            output = forward(*args, **kwargs)
            if layer.training and copies:
                modified = before != [plain_version(tensor) for tensor in tensors]
                self._modifies_input[layer] = self._modifies_input.get(layer, False) or modified
            return output

        def contexts() -> Tuple[ContextManager[None], BuffersUnchanged]:
            return nullcontext(), BuffersUnchanged(layer)

        return checkpoint(run, args, kwargs, use_reentrant=False, context_fn=contexts)


def copied(value: object) -> object:
    """Return a structure with copies of its tensors."""
    return map_tree(value, lambda x: x.clone() if isinstance(x, Tensor) else x)


class BuffersUnchanged:
    """Context that runs a layer or stage on copies of its buffers.

    The recomputation of BatchNorm must not update its statistics again. Copies, because the graph
    of the first run may hold the buffers themselves. A split backward enters it twice.
    """

    def __init__(self, layer: nn.Module) -> None:
        """Create the context for a layer or stage."""
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
