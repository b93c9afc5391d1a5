"""Runs on the stand-in's IPUs as small as they can be."""

import lightning.pytorch as pl
import torch
from models import GLOBAL_BATCH, make_model
from torch.utils.data import DataLoader

from lightning_ipu_bert import IPUStrategy

PLAN = {
    "layers_per_stage": [3, 3],
    "replication_factor": 2,
    "gradient_accumulation_steps": 4,
}
EVALUATION = {"inference_device_iterations": 2, "inference_replication_factor": 2}


class Losses(pl.Callback):
    """Keeps the loss, the step and the learning rate of every batch."""

    def __init__(self):
        self.losses, self.steps, self.rates = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.losses.append(float(outputs["loss"]))
        self.steps.append(trainer.global_step)
        self.rates.append(pl_module.optimizers().param_groups[0]["lr"])


def ipu_strategy(**changes):
    config = {**EVALUATION, **changes.pop("ipu_config", {})}
    return IPUStrategy(**{**PLAN, **changes}, ipu_config=config)


def ipu_trainer(folder, *callbacks, strategy=None, **changes):
    options = {
        "accelerator": "ipu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(folder),
        "callbacks": list(callbacks),
    }
    return pl.Trainer(strategy=strategy or ipu_strategy(), **{**options, **changes})


def plain_trainer(folder, *callbacks, **changes):
    options = {"accelerator": "cpu", "devices": 1, "strategy": "auto"}
    return ipu_trainer(folder, *callbacks, **{**options, **changes})


def loader(examples, replicas=2, **changes):
    """Batches of a weight update of one replica."""
    return DataLoader(examples, GLOBAL_BATCH // replicas, **changes)


def weights_of(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class AdamWWithSchedule:
    """AdamW whose learning rate changes with every update."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def with_adamw(kind, updates=3):
    """A small module that trains by AdamW, and its data."""
    module, examples = make_model(kind, updates)
    own = type(module)
    module.__class__ = type(f"{own.__name__}WithAdamW", (AdamWWithSchedule, own), {})
    return module, examples
