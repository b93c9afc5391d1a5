"""The mark of optimizers whose state can be sharded within every parameter."""

from __future__ import annotations

from abc import ABC


class ElementwiseOptimizer(ABC):  # noqa: B024  # nothing to override
    """Marks an optimizer in which the update of an element depends on its own gradients only.

    Derive from it, or register a class of another package: replicas then share the work and the
    state of each parameter, with `replicated_tensor_sharding`. Other optimizers update whole
    parameters, each on one replica; those of torch are known. ::

        class MyOptimizer(ElementwiseOptimizer, torch.optim.Optimizer): ...
        ElementwiseOptimizer.register(TheirOptimizer)
    """
