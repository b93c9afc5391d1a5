"""Registration of the strategies and the accelerator with Lightning, without importing them.

`import lightning_ipu_bert` takes no time: Lightning and the strategies are imported when they are
used, whichever is imported first.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from wrapt import register_post_import_hook

IPU_STRATEGY = "ipu_pipeline"
IPU_ACCELERATOR = "ipu"
START_METHODS = {"pipeline": "popen", "pipeline_notebook": "fork"}


class OnDemand(NamedTuple):
    """A class in a registry of Lightning, imported when it is used.

    Lightning is not always imported first, and then the modules of these classes may be half
    imported when Lightning is ready.
    """

    module: str
    name: str

    def load(self) -> Any:
        """Import the class."""
        return vars(import_module(self.module))[self.name]

    def __call__(self, **arguments: object) -> object:
        """Create an instance."""
        return self.load()(**arguments)

    def is_available(self) -> bool:
        """Return whether an accelerator can be used: Lightning asks for ``accelerator="auto"``."""
        return bool(self.load().is_available())


PIPELINE = OnDemand(
    "lightning_ipu_bert.strategies.distributed.strategy", "PipelineParallelStrategy"
)
IPU = OnDemand("lightning_ipu_bert.strategies.ipu.strategy", "IPUStrategy")
ACCELERATOR = OnDemand("lightning_ipu_bert.strategies.ipu.accelerator", "IPUAccelerator")


def register_with_lightning() -> None:
    """Register the strategies and the accelerator now, or when Lightning is imported."""
    register_post_import_hook(_register, "lightning.pytorch")


def _register(lightning: Any) -> None:
    """Register what is not registered yet; `lightning` is the imported `lightning.pytorch`."""
    strategies = lightning.strategies.StrategyRegistry
    for name, method in START_METHODS.items():
        if name not in strategies:
            text = f"Pipeline parallelism, with ranks started by {method}"
            strategies.register(name, PIPELINE, description=text, start_method=method)
    if IPU_STRATEGY not in strategies:
        strategies.register(IPU_STRATEGY, IPU, description="Pipeline parallelism on IPUs")
    accelerators = lightning.accelerators.AcceleratorRegistry
    if IPU_ACCELERATOR not in accelerators:
        text = "Graphcore IPUs, through PopTorch"
        accelerators.register(IPU_ACCELERATOR, ACCELERATOR, description=text)
