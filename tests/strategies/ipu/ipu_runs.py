"""Runs on the stand-in's IPUs as small as they can be."""

import lightning.pytorch as pl
import torch
from models import GLOBAL_BATCH, ZERO, make_model
from torch.utils.data import DataLoader

from lightning_ipu_bert import IPUStrategy

PLAN = {
    "layers_per_stage": [3, 3],
    "replication_factor": 2,
    "gradient_accumulation_steps": 4,
}
EVALUATION = {"inference_device_iterations": 2, "inference_replication_factor": 2}


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


def check_weights(found, expected, tolerance=1e-4):
    """Compare all weights but those without gradients, by their norms."""
    for name, weight in found.items():
        weight, truth = weight.float(), expected[name].float()
        if name.endswith("in_proj_bias"):  # of queries, keys and values; keys' gradients are zero
            weight, truth = (torch.cat(t.chunk(3)[::2]) for t in (weight, truth))
        if not name.endswith(ZERO):
            assert (weight - truth).norm() <= tolerance * truth.norm(), name


class AdamWWithSchedule:
    """AdamW whose learning rate changes with every update."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def with_adamw(kind, updates=3):
    """A small module that trains by AdamW, and its data; without kernels that IPUs do not have."""
    module, examples = make_model(kind, updates, fast_kernels=False)
    own = type(module)
    module.__class__ = type(f"{own.__name__}WithAdamW", (AdamWWithSchedule, own), {})
    return module, examples
