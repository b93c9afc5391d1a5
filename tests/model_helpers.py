"""Runs of the Trainer as small as they can be, and which tests need a pipeline."""

import shlex

import lightning.pytorch as pl
import pytest

from lightning_ipu_bert._compat.torch import has_pipelining

needs_pipelining = pytest.mark.skipif(
    not has_pipelining(), reason="runs a pipeline, which the SDK's torch 2.0 cannot"
)
IN_ONE_PROCESS = "--trainer.strategy auto --trainer.devices 1 --data.micro_batch_size 32"
# What configs/quickstart.yaml says to add where no pipeline runs.
QUICKSTART_OPTIONS = [] if has_pipelining() else shlex.split(IN_ONE_PROCESS)


class Losses(pl.Callback):
    """Keeps the training loss and the learning rate of every update."""

    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.rates.append(float(trainer.callback_metrics["lr"]))


def make_trainer(folder, *callbacks, **changes):
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        "default_root_dir": str(folder),
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**{**options, **changes})
