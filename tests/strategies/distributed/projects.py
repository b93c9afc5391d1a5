"""Modules as other people write them, and runs of them: alone, under DDP and as pipelines."""

import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from model_helpers import make_trainer, ordered_loader
from ranks import run_ranks
from torch import nn
from torch.utils.data import Dataset

from lightning_ipu_bert import PipelineModule
from lightning_ipu_bert.training.random_states import seed_generators

PLANS = {
    "2x1": {"layers_per_stage": [1, 1], "gradient_accumulation_steps": 2},
    "1x2": {
        "layers_per_stage": [2],
        "replication_factor": 2,
        "gradient_accumulation_steps": 2,
    },
    "2x2": {
        "layers_per_stage": [1, 1],
        "replication_factor": 2,
        "gradient_accumulation_steps": 2,
    },
}
VARIANTS = {
    "zero_bubble": {**PLANS["2x1"], "schedule": "zero_bubble"},
    "recomputed": {**PLANS["2x1"], "recompute_checkpoint_every_layer": True},
    "sharded": {**PLANS["2x2"], "replicated_tensor_sharding": True},
    "offchip": {**PLANS["2x1"], "optimizer_state_offchip": True},
}
BATCH = 8
"""Examples of a global batch."""


class Table(Dataset):
    """Examples from columns."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


def table(count=32, **more):
    """Examples with four inputs and one of three classes."""
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=numbers)
    return Table(x=x, y=torch.randint(3, (count,), generator=numbers), **more)


class Project(PipelineModule, pl.LightningModule):
    """Two layers that classify; subclasses do what other projects do."""

    optimizer, learning_rate = torch.optim.SGD, 0.2

    def __init__(self):
        super().__init__()
        seed_generators(4)
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 3)])
        self.losses = []

    def pipeline_blocks(self):
        return ["layers.0", "layers.1"]

    def stage_forward(self, blocks, hidden, batch):
        hidden = batch["x"] if hidden is None else hidden
        for name in blocks:
            hidden = torch.tanh(self.get_submodule(name)(hidden))
        return hidden

    def pipeline_loss(self, output, batch):
        return nn.functional.cross_entropy(output, batch["y"])

    def training_step(self, batch, batch_idx):
        loss = self.run_loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.learning_rate)


def plan_of(name):
    """The plan of a name; None for those of plain runs."""
    return {**PLANS, **VARIANTS}.get(name)


def world_of(name):
    """The number of processes."""
    plan = plan_of(name) or {}
    ranks = len(plan.get("layers_per_stage", [1])) * plan.get("replication_factor", 1)
    return 2 if name == "ddp" else ranks


def loader_of(name, trainer, examples):
    """Return global batches in order, of which a replica or process has its share."""
    share = {"replication_factor": 2} if name == "ddp" else plan_of(name)
    return ordered_loader(examples, BATCH, trainer, share)


def fit(name, folder, kind, examples=None, report=lambda module: None, **changes):
    """Train an epoch, alone or as a rank; return losses, weights, and what `report` returns.

    Args:
        name: auto, ddp (two processes), or one of `PLANS`.
        folder: For files of the run.
        kind: Returns the module.
        examples: A dataset.
        report: Called with the trained module.
        changes: Arguments of the Trainer.
    """
    warnings.simplefilter("ignore")
    module, plan = kind(), plan_of(name)
    ddp = {"strategy": "ddp", "devices": 2} if name == "ddp" else {}
    more, ckpt_path = changes.pop("callbacks", ()), changes.pop("ckpt_path", None)
    trainer = make_trainer(folder, *more, plan=plan, **{"max_epochs": 1, **ddp, **changes})
    trainer.fit(module, loader_of(name, trainer, examples or table()), ckpt_path=ckpt_path)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    return module.losses, state, report(module)


def fit_ranks(name, folder, kind, *args, **changes):
    """Train as the ranks of a plan, or as processes of DDP; return what each of them did."""
    return run_ranks(world_of(name), partial(fit, name, folder, kind, *args, **changes))


def assert_close(states, expected):
    """Compare the weights of all ranks with those of one process."""
    for state in states:
        assert list(state) == list(expected)
        for key, value in state.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=key)


def assert_alike(runs, expected, rel=1e-5):
    """Compare the losses and weights of all ranks with those of one process; see `fit`."""
    for losses, state, _ in runs:
        assert losses == pytest.approx(expected[0], rel=rel)
        assert_close([state], expected[1])
