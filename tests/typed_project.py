"""A user's project with types of its own, which must pass `mypy --strict`: see test_types.py."""

from __future__ import annotations

from typing import Dict, List, Mapping, Sequence, Tuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_ipu_bert import (
    BertForQuestionAnsweringModule,
    IPUStrategy,
    PipelineModule,
    PipelineParallelStrategy,
    SquadDataModule,
)

Batch = Dict[str, Tensor]


class LanguageModel(PipelineModule, pl.LightningModule):
    """The module of the README, typed."""

    def __init__(self, layers: int = 6, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 31)

    def pipeline_blocks(self) -> List[str]:
        return ["embed", *(f"layers.{i}" for i in range(len(self.layers))), "head"]

    def stage_forward(self, blocks: Sequence[str], hidden: Tensor | None, batch: Batch) -> Tensor:
        for name in blocks:
            block = self.get_submodule(name)
            hidden = block(batch["tokens"][:, :-1] if name == "embed" else hidden)
        assert hidden is not None
        return hidden

    def pipeline_loss(self, output: Tensor, batch: Batch) -> Tensor:
        return cross_entropy(output.flatten(0, 1), batch["tokens"][:, 1:].flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = self.run_loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", self.pipeline_loss(self.run_output(batch), batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class SmoothedQuestionAnswering(BertForQuestionAnsweringModule):
    """A subclass with another loss and a hidden state of a narrower type."""

    def stage_forward(
        self, blocks: Sequence[str], hidden: Tensor | None, batch: Mapping[str, Tensor]
    ) -> Tensor | Tuple[Tensor, Tensor]:
        output: Tensor = super().stage_forward(blocks, hidden, batch)
        return output

    def pipeline_loss(self, output: Tuple[Tensor, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        starts, ends = output
        start = cross_entropy(starts, batch["start_positions"], label_smoothing=0.1)
        return (start + cross_entropy(ends, batch["end_positions"], label_smoothing=0.1)) / 2


class ShortAnswers(SquadDataModule):
    """A subclass of the data module."""

    def __init__(self, train_file: str) -> None:
        super().__init__(train_file=train_file, max_answer_length=5)

    def train_dataloader(self) -> DataLoader[Batch]:
        return super().train_dataloader()


def edit(options: object, training: bool) -> None:
    """Options of PopTorch for this project."""


ranks = pl.Trainer(devices=2, strategy=PipelineParallelStrategy(layers_per_stage=[3, 3]))
ipus = pl.Trainer(strategy=IPUStrategy(layers_per_stage=[3, 3], edit_options=edit))
ranks.fit(LanguageModel())
ranks.fit(SmoothedQuestionAnswering("bert-base-uncased"), datamodule=ShortAnswers("train.json"))
