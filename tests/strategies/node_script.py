"""A run whose ranks are started by torchrun or SLURM: python node_script.py FOLDER NODES DEVICES.

Two stages, and as many replicas as there are pairs of ranks. Every rank writes its losses and a sum
over the trained weights to FOLDER.
"""

import json
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
from language_model import LanguageModel, Sentences
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ipu_bert import PipelineParallelStrategy


class Recording(LanguageModel):
    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def train_on_nodes(folder, num_nodes, devices):
    warnings.simplefilter("ignore")
    pl.seed_everything(3, verbose=False)
    replicas = num_nodes * devices // 2
    strategy = PipelineParallelStrategy(
        layers_per_stage=[3, 3],
        replication_factor=replicas,
        gradient_accumulation_steps=4,
        timeout_seconds=60,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    share, module = trainer.distributed_sampler_kwargs, Recording()
    examples = Sentences(64)
    sampler = DistributedSampler(examples, shuffle=False, **share)
    trainer.fit(module, DataLoader(examples, 16 // replicas, sampler=sampler))
    weights = float(sum(p.detach().double().sum() for p in module.parameters()))
    return {"losses": module.losses, "weights": weights, "share": share}, trainer.global_rank


if __name__ == "__main__":
    answer, rank = train_on_nodes(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    (Path(sys.argv[1]) / f"rank{rank}.json").write_text(json.dumps(answer))
