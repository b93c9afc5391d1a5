"""Parameters as other projects have them, beside one process."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from model_helpers import needs_pipelining
from projects import PLANS, Project, assert_alike, assert_close, fit, fit_ranks
from torch import nn

pytestmark = [pytest.mark.slow, needs_pipelining]


class Temperature(Project):
    """A parameter of the loss."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def pipeline_loss(self, output, batch):
        return super().pipeline_loss(output * self.temperature, batch)


class Aliased(Project):
    """A name outside of all blocks for a weight inside of one, as T5 and BART have."""

    def __init__(self):
        super().__init__()
        self.shared = self.layers[0]


class Adding(nn.Linear):
    """Adds up what it is given, in a buffer and in an extra state."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("total", torch.zeros(()))
        self.seen = torch.zeros(())

    def forward(self, x):
        self.total += x.detach().abs().sum()
        self.seen = self.total.clone()
        return super().forward(x)

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


class AliasedFirst(Project):
    """Names outside of all blocks, before and after those of blocks with more than parameters."""

    def __init__(self):
        super().__init__()
        del self.layers
        layers = nn.ModuleList([Adding(4, 6), Adding(6, 3)])
        self.first, self.layers, self.last = layers[1], layers, layers[0]


class TiedInside(Project):
    """A weight that a block has twice, and a name outside."""

    def __init__(self):
        super().__init__()
        self.layers[1] = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
        self.layers[1][2].weight = self.layers[1][0].weight
        self.also = self.layers[1][0].weight


class Parameterless(Project):
    """Stages of which some have nothing to train."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Tanh(), nn.Flatten(), nn.Linear(4, 3), nn.Identity(), nn.Softsign()]
        )

    def pipeline_blocks(self):
        return [f"layers.{i}" for i in range(5)]


class OnlyOneTrained(Project):
    """All parameters are on one stage."""

    def __init__(self):
        super().__init__()
        self.layers[1] = nn.Softsign()


class CreatedLater(Project):
    def __init__(self):
        super().__init__()
        self.made, self.layers = self.layers, None

    def configure_model(self):
        if self.layers is None:
            self.layers, self.made = self.made, None


class Unfreezing(Project):
    """The second epoch trains everything."""

    def __init__(self):
        super().__init__()
        self.layers[0].requires_grad_(False)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.layers[0].requires_grad_(True)


class Freezing(Project):
    def on_train_epoch_start(self):
        self.layers[self.current_epoch].requires_grad_(False)
        self.layers[1 - self.current_epoch].requires_grad_(True)


class Finetuning(BaseFinetuning):
    """Adds a group to the optimizer."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.layers[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.layers[0], optimizer, lr=0.05)


class Finetuned(Project):
    optimizer = torch.optim.AdamW
    learning_rate = 0.05

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.learning_rate)


class Toggling(Project):
    """Two optimizers, each for a stage, take turns."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = self.run_loss(batch)
            self.losses.append(float(loss.detach()))
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.2) for layer in self.layers]


class Manual(Project):
    """Accumulates two losses, and steps by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for factor in (1.0, 0.5):
            loss = self.run_loss(batch)
            self.manual_backward(factor * loss)
        self.losses.append(float(loss.detach()))
        if batch_idx % 2:
            self.clip_gradients(optimizer, 0.3, "norm")
            optimizer.step()
            optimizer.zero_grad()


KINDS = [
    Temperature,
    Aliased,
    TiedInside,
    OnlyOneTrained,
    CreatedLater,
    Unfreezing,
    Freezing,
    Toggling,
    Manual,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", ["2x1", "1x2", "2x2"])
def test_parameters_train_as_in_one_process(plan, kind, tmp_path):
    expected = fit("auto", tmp_path, kind, max_epochs=2)
    assert_alike(fit_ranks(plan, tmp_path, kind, max_epochs=2), expected)


def test_buffers_and_extra_states_have_aliases(tmp_path):
    expected = fit("auto", tmp_path, AliasedFirst)
    saved = pl.callbacks.ModelCheckpoint(tmp_path / "saved", filename="last")
    runs = fit_ranks("2x1", tmp_path, AliasedFirst, callbacks=[saved])
    assert_alike(runs, expected)
    checkpoint = torch.load(tmp_path / "saved" / "last.ckpt")
    assert_close([checkpoint["state_dict"]], expected[1])


@pytest.mark.parametrize("replicas", [1, 2])
def test_stages_without_parameters(replicas, tmp_path):
    expected = fit("auto", tmp_path, Parameterless)
    PLANS["three"] = {
        "layers_per_stage": [2, 1, 2],
        "gradient_accumulation_steps": 4 // replicas,
        "replication_factor": replicas,
        "schedule": "gpipe",
    }
    try:
        results = fit_ranks("three", tmp_path, Parameterless)
    finally:
        del PLANS["three"]
    assert_alike(results, expected)


@pytest.mark.parametrize("plan", ["2x1", "2x2", "sharded"])
def test_fine_tuning_adds_parameter_groups(plan, tmp_path):
    def callbacks():
        return [Finetuning(), pl.callbacks.ModelCheckpoint(tmp_path / plan, save_last=True)]

    expected = fit("auto", tmp_path, Finetuned, max_epochs=3, callbacks=callbacks())
    results = fit_ranks(plan, tmp_path, Finetuned, max_epochs=3, callbacks=callbacks())
    assert_alike(results, expected, rel=1e-4)
