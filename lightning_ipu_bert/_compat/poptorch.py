"""PopTorch 3.4: its private names. There will be no newer version."""

from __future__ import annotations

from typing import Any

from torch import nn


def popart_options(options: Any) -> Any:
    """Return the options of PopART, the compiler; `_Popart` is what Graphcore's own examples use.

    Source: poptorch/options.py, `Options._Popart`; examples/nlp/bert/pytorch/ipu_options.py.
    """
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
