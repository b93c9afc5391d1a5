"""Tuners, and steps that a pipeline cannot run: they say so."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_module
from lightning.pytorch.tuner import Tuner
from model_helpers import make_trainer, needs_pipelining
from projects import PLANS, Project, assert_close, loader_of, plan_of, table, world_of
from ranks import run_ranks
from torch.utils.data import DataLoader

from lightning_ipu_bert import PipelineParallelStrategy, UserError

pytestmark = [pytest.mark.slow, needs_pipelining]


class Tuned(Project):
    def __init__(self):
        super().__init__()
        self.lr, self.batch_size = 0.2, 4
        self.sizes = []

    def training_step(self, batch, batch_idx):
        self.sizes.append(len(batch["x"]))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(table(64), self.batch_size)


def rate_found(name, folder):
    warnings.simplefilter("ignore")
    module, trainer = Tuned(), make_trainer(folder, plan=plan_of(name), max_epochs=1)
    loader = loader_of(name, trainer, table(256))
    found = Tuner(trainer).lr_find(module, loader, num_training=20, min_lr=1e-3, max_lr=1.0)
    tuned = {key: value.clone() for key, value in module.state_dict().items()}
    module.losses.clear()
    trainer.fit(module, loader)
    results = [found.results["loss"], found.results["lr"], found.suggestion(), module.lr]
    state = {key: value.clone() for key, value in module.state_dict().items()}
    return results, module.losses, tuned, state


@pytest.mark.parametrize("plan", ["2x1", "2x2"])
def test_the_learning_rate_finder_finds_the_rate_of_one_process(plan, tmp_path):
    results, losses, tuned, state = rate_found("auto", tmp_path)
    assert results[2] == results[3] != 0.2
    assert_close([tuned], Project().state_dict())  # as before
    for found, found_losses, found_tuned, found_state in run_ranks(
        world_of(plan), rate_found, plan, tmp_path
    ):
        for one, other in zip(found, results):
            assert one == pytest.approx(other, rel=1e-4)
        assert found_losses == pytest.approx(losses, rel=1e-4)
        assert_close([found_tuned], tuned)
        assert_close([found_state], state)


def rate_found_by_callback(name, folder):
    warnings.simplefilter("ignore")
    finder = pl.callbacks.LearningRateFinder(num_training_steps=10, min_lr=1e-3)
    module, trainer = Tuned(), make_trainer(folder, finder, plan=plan_of(name), max_epochs=1)
    trainer.fit(module, loader_of(name, trainer, table(128)))
    return module.lr, module.losses[10:], module.state_dict()


def test_the_callback_that_finds_the_learning_rate(tmp_path):
    rate, losses, state = rate_found_by_callback("auto", tmp_path)
    for found, found_losses, found_state in run_ranks(2, rate_found_by_callback, "2x1", tmp_path):
        assert found == pytest.approx(rate)
        assert found_losses == pytest.approx(losses, rel=1e-4)
        assert_close([found_state], state)


def size_found(name, folder, mode):
    warnings.simplefilter("ignore")
    module, trainer = Tuned(), make_trainer(folder, plan=plan_of(name), max_epochs=1)
    found = Tuner(trainer).scale_batch_size(
        module, mode=mode, max_trials=3, init_val=4, steps_per_trial=2
    )
    return found, module.batch_size, sorted(set(module.sizes)), module.state_dict()


@pytest.mark.parametrize("mode", ["power", "binsearch"])
@pytest.mark.parametrize("plan", ["2x1", "2x2"])
def test_the_batch_size_scaler_finds_the_size_of_one_process(plan, mode, tmp_path):
    *expected, state = size_found("auto", tmp_path, mode)
    for *found, found_state in run_ranks(world_of(plan), size_found, plan, tmp_path, mode):
        assert found == expected
        assert_close([found_state], state)


class Calling(Project):
    """Calls the layers itself."""

    def forward(self, x):
        return self.stage_forward(self.pipeline_blocks(), None, {"x": x})

    def training_step(self, batch, batch_idx):
        return self.pipeline_loss(self(batch["x"]), batch)


class Penalizing(Project):
    def training_step(self, batch, batch_idx):
        return self.run_loss(batch) + 0.1 * sum(p.pow(2).sum() for p in self.parameters())


class PenalizingByNorm(Project):
    def training_step(self, batch, batch_idx):
        return self.run_loss(batch) + torch.stack([p.norm() for p in self.parameters()]).sum()


class Validating(Calling):
    training_step = Project.training_step

    def validation_step(self, batch, batch_idx):
        self(batch["x"])

    def val_dataloader(self):
        return DataLoader(table(8), 4)


def fit_wrong(kind, folder):
    trainer = make_trainer(folder, plan=PLANS["2x1"], max_epochs=1)
    trainer.fit(kind(), loader_of("2x1", trainer, table()))


@pytest.mark.parametrize("kind", [Calling, Penalizing, PenalizingByNorm, Validating])
@pytest.mark.usefixtures("short_grace")
def test_steps_that_need_other_stages_are_refused_and_named(kind, tmp_path):
    with pytest.raises(AssertionError, match=r"UserError: The parameter layers.*self.run_output"):
        run_ranks(2, fit_wrong, kind, tmp_path)


def test_objects_of_another_package_are_refused(tmp_path, monkeypatch):
    # Its import gives what both packages log to a logger of its own, for all later tests.
    monkeypatch.setattr(rank_zero_module, "log", rank_zero_module.log)
    other = pytest.importorskip("pytorch_lightning")
    strategy = PipelineParallelStrategy(**PLANS["2x1"])
    trainer = make_trainer(tmp_path, other.Callback(), strategy=strategy, devices=2)
    with pytest.raises(UserError, match="is of the package pytorch_lightning, but the Trainer"):
        trainer.fit(Project(), loader_of("2x1", trainer, table()))
