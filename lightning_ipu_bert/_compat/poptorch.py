"""PopTorch 3.4: private names. There is no newer version.

Files are relative to https://github.com/graphcore/poptorch/tree/sdk-release-3.4/python.

- `Options._Popart` (options.py): options of the compiler, as in Graphcore's own examples.
- `PoptorchParameter`, `PoptorchBuffer` (_impl.py): classes that PopTorch leaves on tensors.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def popart_options(options: Any) -> Any:
    """Return the options of PopART, the compiler."""
    return options._Popart


def unwrap(module: nn.Module) -> None:
    """Restore the classes of parameters and buffers.

    Decided by name, because the classes are created in a function of PopTorch, for each model.

    PopTorch sets classes that fetch weights on access, restores the original ones in `destroy`, and
    sets them again whenever another program is compiled (`_impl._wrapper_registry`); the next
    training program then rejects the buffers.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        if type(tensor).__name__ in ("PoptorchParameter", "PoptorchBuffer"):
            tensor.__class__ = type(tensor).__bases__[0]
