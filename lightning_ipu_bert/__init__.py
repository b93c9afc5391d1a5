"""Pipelined BERT for PyTorch Lightning: on Graphcore IPUs, CPUs and GPUs."""

from importlib import import_module
from typing import TYPE_CHECKING, List

from lightning_ipu_bert.registration import register_with_lightning

if TYPE_CHECKING:
    from lightning_ipu_bert.data.squad import SquadDataModule
    from lightning_ipu_bert.errors import UserError
    from lightning_ipu_bert.models.question_answering import BertForQuestionAnsweringModule
    from lightning_ipu_bert.ops.dropout import Dropout
    from lightning_ipu_bert.pipeline.ipu.config import IPUConfig
    from lightning_ipu_bert.pipeline.protocol import PipelineModule
    from lightning_ipu_bert.strategies.distributed.strategy import PipelineParallelStrategy
    from lightning_ipu_bert.strategies.ipu.accelerator import IPUAccelerator
    from lightning_ipu_bert.strategies.ipu.strategy import IPUStrategy
    from lightning_ipu_bert.training.allocator import KeepFreedMemory
    from lightning_ipu_bert.training.elementwise import ElementwiseOptimizer
    from lightning_ipu_bert.training.fused import use_fused_steps

__version__ = "0.1.0"

__all__ = [
    "BertForQuestionAnsweringModule",
    "Dropout",
    "ElementwiseOptimizer",
    "IPUAccelerator",
    "IPUConfig",
    "IPUStrategy",
    "KeepFreedMemory",
    "PipelineModule",
    "PipelineParallelStrategy",
    "SquadDataModule",
    "UserError",
    "__version__",
    "use_fused_steps",
]

MODULES = {
    "BertForQuestionAnsweringModule": "models.question_answering",
    "Dropout": "ops.dropout",
    "ElementwiseOptimizer": "training.elementwise",
    "IPUAccelerator": "strategies.ipu.accelerator",
    "IPUConfig": "pipeline.ipu.config",
    "IPUStrategy": "strategies.ipu.strategy",
    "KeepFreedMemory": "training.allocator",
    "PipelineModule": "pipeline.protocol",
    "PipelineParallelStrategy": "strategies.distributed.strategy",
    "SquadDataModule": "data.squad",
    "UserError": "errors",
    "use_fused_steps": "training.fused",
}
"""Modules of the public names, imported at the first use (PEP 562): `ask` starts without them."""


def __getattr__(name: str) -> object:
    """Import a public name."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = vars(import_module(f"{__name__}.{MODULES[name]}"))[name]
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})


register_with_lightning()
