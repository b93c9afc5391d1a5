"""PopTorch 3.4: its private names. No newer version will end them.

Files are relative to https://github.com/graphcore/poptorch/tree/sdk-release-3.4/python.

- `Options._Popart` (options.py): options of the compiler, as in Graphcore's own examples.
- `PoptorchParameter`, `PoptorchBuffer` (_impl.py): classes that PopTorch leaves behind.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def popart_options(options: Any) -> Any:
    """Return the options of PopART, the compiler."""
    return options._Popart


def unwrap(module: nn.Module) -> None:
    """Give parameters and buffers their own classes back.

    PopTorch gives them classes that fetch weights when they are looked at, takes these away in
    `destroy`, and gives them back whenever another program is compiled (`_impl._wrapper_registry`);
    the next training program then refuses the buffers.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        if type(tensor).__name__ in ("PoptorchParameter", "PoptorchBuffer"):
            tensor.__class__ = type(tensor).__bases__[0]
