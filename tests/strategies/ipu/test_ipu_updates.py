"""Updates are what is counted, logged and saved by, also where a call is several of them."""

import csv

import pytest
import torch
from ipu_runs import (
    ipu_strategy,
    ipu_trainer,
    loader,
    plain_trainer,
    weights_of,
    with_adamw,
)
from language_model import LanguageModel, Sentences
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from model_helpers import Losses
from models import GLOBAL_BATCH


def test_logs_and_callbacks_see_each_update(tmp_path):
    rows = []
    for make in (plain_trainer, ipu_trainer):
        module, examples = with_adamw("bert", updates=4)
        logger = CSVLogger(tmp_path, name=make.__name__)
        trainer = make(tmp_path, LearningRateMonitor("step"), logger=logger, log_every_n_steps=2)
        trainer.fit(module, loader(examples, 1 if make is plain_trainer else 2))
        rows.append((tmp_path / make.__name__ / "version_0" / "metrics.csv").read_text())
    plain, ours = (text.splitlines() for text in rows)
    assert plain[0] == ours[0]
    columns = plain[0].split(",")
    for expected, found in zip(plain[1:], ours[1:]):
        for name, a, b in zip(columns, expected.split(","), found.split(",")):
            if "/s" not in name:  # examples/s differs
                assert float(a or 0) == pytest.approx(float(b or 0), rel=1e-5)


def test_device_iterations_are_counted_as_updates(tmp_path):
    module, examples = with_adamw("bert", updates=4)
    losses = Losses()
    logger = CSVLogger(tmp_path, name="logs")
    keeper = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_top_k=-1)
    strategy = ipu_strategy(ipu_config={"device_iterations": 2})
    callbacks = (losses, keeper, LearningRateMonitor("step"))
    trainer = ipu_trainer(
        tmp_path, *callbacks, strategy=strategy, logger=logger, log_every_n_steps=2
    )
    trainer.fit(module, loader(examples), loader(examples))
    assert losses.steps == [2, 4]
    assert losses.rates == pytest.approx([1e-2 / 3, 1e-2 / 5])  # of the next update
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == [
        "epoch=0-step=2.ckpt",
        "epoch=0-step=4.ckpt",
        "ipu_config.json",
    ]
    logged = {}
    text = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text()
    for row in csv.DictReader(text.splitlines()):
        for name, value in row.items():
            if value and name in ("lr-AdamW", "train/loss", "val/loss"):
                logged.setdefault(name, []).append((int(row["step"]), float(value)))
    # As Lightning does: losses at the last update, counted from 0. The rate is that of the first
    # update of a call: of updates 0 and 2 of 1 / (1 + update).
    assert logged["lr-AdamW"] == [(1, pytest.approx(1e-2)), (3, pytest.approx(1e-2 / 3))]
    assert logged["train/loss"] == [(1, losses.losses[0]), (3, losses.losses[1])]
    assert [step for step, _ in logged["val/loss"]] == [3]


def test_two_iterations_of_one_call_are_two_updates_at_one_rate(tmp_path):
    def constant(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    found = []
    for iterations in (1, 2):
        module, examples = with_adamw("language model", updates=4)
        type(module).configure_optimizers = constant
        strategy = ipu_strategy(ipu_config={"device_iterations": iterations})
        trainer = ipu_trainer(tmp_path, strategy=strategy, max_steps=4)
        trainer.fit(module, loader(examples))
        assert trainer.global_step == 4
        found.append(weights_of(module))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight)


def test_the_length_of_a_schedule_counts_updates(tmp_path):
    seen = []

    class Asks(LanguageModel):
        def configure_optimizers(self):
            seen.append(self.estimated_updates())
            return super().configure_optimizers()

    for steps in (-1, 2):
        strategy = ipu_strategy(ipu_config={"device_iterations": 2})
        trainer = ipu_trainer(tmp_path, strategy=strategy, max_epochs=2, max_steps=steps)
        trainer.fit(Asks(), loader(Sentences(4 * GLOBAL_BATCH)))
    assert seen == [8, 2]


@pytest.mark.filterwarnings("ignore:.*dataloader_iter", "ignore:.*infer the indices")
def test_updates_of_a_step_that_draws_its_batch_are_logged_too(tmp_path):
    class Draws(LanguageModel):
        def training_step(self, dataloader_iter):
            loss = self.run_loss(next(dataloader_iter)[0])
            self.log("train/loss", loss, batch_size=1)
            return loss

    strategy = ipu_strategy(ipu_config={"device_iterations": 2})
    logger = CSVLogger(tmp_path, "", "logs")
    trainer = ipu_trainer(tmp_path, strategy=strategy, logger=logger, log_every_n_steps=2)
    trainer.fit(Draws(), loader(Sentences(4 * GLOBAL_BATCH)))
    rows = csv.DictReader((tmp_path / "logs" / "metrics.csv").read_text().splitlines())
    assert [row["step"] for row in rows] == ["1", "3"]
