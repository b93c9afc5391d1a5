"""A small decoder language model, as in a project of a user."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_ipu_bert import PipelineModule

VOCABULARY = 31


class LanguageModel(PipelineModule, pl.LightningModule):
    def __init__(self, layers=6, width=16, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 2, 2 * width, dropout, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(width, VOCABULARY)

    def pipeline_blocks(self):
        return ["embed", *(f"layers.{i}" for i in range(len(self.layers))), "head"]

    def stage_forward(self, blocks, hidden, batch):
        mask = nn.Transformer.generate_square_subsequent_mask(
            batch["tokens"].shape[1] - 1, device=batch["tokens"].device
        )
        for name in blocks:
            if name == "embed":
                hidden = self.embed(batch["tokens"][:, :-1])
            elif name == "head":
                hidden = self.head(hidden)
            else:
                hidden = self.get_submodule(name)(hidden, mask, is_causal=True)
        return hidden

    def pipeline_loss(self, output, batch):
        return cross_entropy(output.flatten(0, 1), batch["tokens"][:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        loss = self.run_loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = self.pipeline_loss(self.run_output(batch), batch)
        self.log("val/loss", loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Sentences(torch.utils.data.Dataset):
    """Random tokens, the same ones in every process."""

    def __init__(self, count, length=13):
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, VOCABULARY, (count, length), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"tokens": self.tokens[index]}
