"""A run whose ranks may come to harm: python fault_script.py FOLDER HARM RANK [CKPT_PATH].

HARM is none, kill, memory, term (SIGTERM), int (SIGINT of this rank), terminal (SIGINT of all, as
Ctrl-C sends it), twice (the same, and once more), save (a kill in the middle of a save), in the
step HARM_STEP; end (SIGTERM in a validation after the training); early (as terminal, before the
first step). EPOCHS in the environment are trained, of two updates each, with the LAYOUT 2x1 (stages
x replicas) or another one. PHASES prints where the run is; TIMEOUT is that of communication; NODES
are machines, of which this is the first.
"""

import os
import signal
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from language_model import LanguageModel, Sentences
from torch.utils.data import DataLoader

from lightning_ipu_bert import PipelineParallelStrategy
from lightning_ipu_bert.data.loaders import ResumableDataLoader, TrainingSampler
from lightning_ipu_bert.training.checkpoint_io import AtomicCheckpointIO

HARM_STEP = int(os.environ.get("HARM_STEP", 4))
STAGES, REPLICAS = (int(number) for number in os.environ.get("LAYOUT", "2x1").split("x"))
NODES = int(os.environ.get("NODES", 1))
PHASES = bool(os.environ.get("PHASES"))


def phase(name):
    if PHASES:
        print(f"phase {name}", flush=True)


def harm(kind):
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if kind == "int":
        os.kill(os.getpid(), signal.SIGINT)
    if kind in ("terminal", "twice", "early"):
        os.killpg(0, signal.SIGINT)
    if kind == "twice":
        time.sleep(0.5)
        os.killpg(0, signal.SIGINT)
    if kind == "memory":
        raise MemoryError("no memory is left in this stage")


class Fragile(LanguageModel):
    harmed = False

    def stage_forward(self, blocks, hidden, batch):
        now = self.training and self.trainer.global_step == HARM_STEP and here(self.trainer)
        if now and not self.harmed:  # with the first of its micro-batches
            self.harmed = True
            harm(sys.argv[2])
        if sys.argv[2] == "end" and not self.training and here(self.trainer):
            harm("term")
        return super().stage_forward(blocks, hidden, batch)

    def setup(self, stage):
        phase("collective")

    def configure_optimizers(self):
        if sys.argv[2] == "early" and here(self.trainer):
            harm("early")
        return super().configure_optimizers()

    def on_validation_batch_start(self, batch, batch_idx):
        if self.trainer.is_global_zero:
            print(f"validation {batch_idx}", flush=True)
            phase("validation")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.is_global_zero:
            print(f"loss {self.trainer.global_step} {float(outputs['loss']):.9f}", flush=True)


class FragileIO(AtomicCheckpointIO):
    """Is killed when half of a checkpoint is written."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if sys.argv[2] == "save" and checkpoint["global_step"] == HARM_STEP:
            torch.save = lambda _, file: (Path(file).write_bytes(b"half"), harm("kill"))
        phase("save")
        super().save_checkpoint(checkpoint, path, storage_options)


def here(trainer):
    return trainer.global_rank == int(sys.argv[3])


def main(folder, ckpt_path=None):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pl.seed_everything(8, verbose=False)
    strategy = PipelineParallelStrategy(
        layers_per_stage=[6 // STAGES] * STAGES,
        replication_factor=REPLICAS,
        gradient_accumulation_steps=4,
        checkpoint_io=FragileIO(),
        timeout_seconds=float(os.environ.get("TIMEOUT", 1800)),
    )
    checkpoints = pl.callbacks.ModelCheckpoint(
        folder,
        filename="best",
        save_last=True,
        save_on_exception=True,
        enable_version_counter=False,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=STAGES * REPLICAS // NODES,
        num_nodes=NODES,
        strategy=strategy,
        max_epochs=int(os.environ.get("EPOCHS", 4)),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoints],
    )
    examples = Sentences(16 * REPLICAS)
    share = trainer.distributed_sampler_kwargs
    sampler = TrainingSampler([12] * len(examples), 8, **share)
    loader = ResumableDataLoader(examples, 8, sampler=sampler)
    module = Fragile()
    validation = DataLoader(examples, 4) if PHASES else None
    trainer.fit(module, loader, validation, ckpt_path=ckpt_path)
    if sys.argv[2] == "end":
        trainer.validate(module, DataLoader(examples, 4), verbose=False)
        print("not reached", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *sys.argv[4:])
