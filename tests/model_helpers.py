"""Runs of the Trainer as small as they can be, and which tests need a pipeline."""

import shlex

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ipu_bert import PipelineParallelStrategy
from lightning_ipu_bert._compat.torch import has_pipelining

needs_pipelining = pytest.mark.skipif(
    not has_pipelining(), reason="runs a pipeline, which the SDK's torch 2.0 cannot"
)
IN_ONE_PROCESS = "--trainer.strategy auto --trainer.devices 1 --data.micro_batch_size 32"
# What configs/quickstart.yaml says to add where no pipeline runs.
QUICKSTART_OPTIONS = [] if has_pipelining() else shlex.split(IN_ONE_PROCESS)


class Losses(pl.Callback):
    """Keeps of every batch: loss, step, and learning rate (the logged and the next one)."""

    def __init__(self):
        self.losses, self.steps, self.rates, self.logged_rates = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.steps.append(trainer.global_step)
        self.rates.append(pl_module.optimizers().param_groups[0]["lr"])
        if "lr" in trainer.callback_metrics:
            self.logged_rates.append(float(trainer.callback_metrics["lr"]))


def make_trainer(folder, *callbacks, plan=None, **changes):
    """Make a Trainer without any output: as one of a plan's ranks, or plain."""
    strategy = PipelineParallelStrategy(**plan) if plan else "auto"
    options = {
        "accelerator": "cpu",
        "strategy": strategy,
        "devices": strategy.config.shape.num_devices if plan else 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        "default_root_dir": str(folder),
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**{**options, **changes})


def ordered_loader(examples, batch_size, trainer, plan=None):
    """Batches of a global batch size in order; the replicas of a plan share them."""
    share = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    sampler = DistributedSampler(examples, shuffle=False, **share)
    replicas = (plan or {}).get("replication_factor", 1)
    return DataLoader(examples, batch_size // replicas, sampler=sampler)
