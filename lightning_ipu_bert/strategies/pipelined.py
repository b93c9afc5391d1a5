"""What strategies run, as a type."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from lightning_ipu_bert.pipeline.protocol import PipelineModule


class PipelinedModule(PipelineModule, LightningModule):
    """A LightningModule that can be pipelined, for annotations: users derive from both."""
