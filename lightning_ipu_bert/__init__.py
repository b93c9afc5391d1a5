"""Pipelined BERT for PyTorch Lightning: on Graphcore IPUs, CPUs and GPUs."""

from lightning_ipu_bert.data.squad import SquadDataModule
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.models.question_answering import BertForQuestionAnsweringModule
from lightning_ipu_bert.ops.dropout import Dropout
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig
from lightning_ipu_bert.pipeline.protocol import PipelineModule
from lightning_ipu_bert.strategies import (
    IPUAccelerator,
    IPUStrategy,
    PipelineParallelStrategy,
    register_strategies,
)
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

register_strategies()
