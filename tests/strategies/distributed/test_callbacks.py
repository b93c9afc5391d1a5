"""Lightning's callbacks and loggers on a pipeline do what they do in one process."""

import csv
import logging
import warnings

import lightning.pytorch as pl
import pytest
import torch
from language_model import LanguageModel, Sentences
from model_helpers import make_trainer, needs_pipelining, ordered_loader
from ranks import run_ranks
from torch.utils.data import DataLoader

pytestmark = needs_pipelining
TWO = {"layers_per_stage": [3, 3], "gradient_accumulation_steps": 4}
TWO_BY_TWO = {**TWO, "replication_factor": 2}
PLANS = {"2x1": TWO, "2x2": TWO_BY_TWO}


class Worsening(LanguageModel):
    """Learns for two epochs; then its learning rate makes it worse."""

    def training_step(self, batch, batch_idx):
        loss = self.run_loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - 2 * (epoch > 1))
        return [optimizer], [schedule]


def train_worsening(plan, folder, *callbacks, **changes):
    """Train as one of the plan's ranks or plain; return the Trainer."""
    warnings.simplefilter("ignore")
    pl.seed_everything(5, verbose=False)
    trainer = make_trainer(folder, *callbacks, plan=plan, **{"max_epochs": 6, **changes})
    loader = ordered_loader(Sentences(48), 16, trainer, plan)
    trainer.fit(Worsening(), loader, DataLoader(Sentences(12), 4))
    return trainer


def world_of(plan):
    return 2 * plan.get("replication_factor", 1)


def _stop(plan, folder):
    best = pl.callbacks.ModelCheckpoint(
        folder, "{epoch}", monitor="val/loss", enable_version_counter=False
    )
    early = pl.callbacks.EarlyStopping("val/loss", patience=2)
    trainer = train_worsening(plan, folder, best, early)
    return trainer.current_epoch, early.stopped_epoch, best.best_model_path, best.best_model_score


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_best_checkpoint_is_kept_and_training_stops_early(plan, tmp_path):
    plain = _stop(None, tmp_path)
    assert plain[:2] == (4, 3)
    for *when, path, score in run_ranks(world_of(plan), _stop, plan, tmp_path):
        assert (*when, path) == plain[:3]
        assert float(score) == pytest.approx(float(plain[3]), rel=1e-5)


def _log(plan, folder):
    logger = pl.loggers.CSVLogger(folder, name="", version="")
    monitor = pl.callbacks.LearningRateMonitor()
    train_worsening(plan, folder, monitor, max_epochs=3, logger=logger, log_every_n_steps=1)


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_loggers_see_what_they_see_in_one_process(plan, tmp_path):
    _log(None, tmp_path / "plain")
    expected = rows_of(tmp_path / "plain")
    run_ranks(world_of(plan), _log, plan, tmp_path / "ranks")
    found = rows_of(tmp_path / "ranks")
    assert len(found) == len(expected) == 9 + 3 + 3  # losses, learning rates, validations
    for row, truth in zip(found, expected):
        # A replica logs the loss of its own examples, unless it is told to share.
        local = ["train/loss"] if plan is TWO_BY_TWO else []
        for name in set(truth) - set(local):
            if truth[name]:
                assert float(row[name]) == pytest.approx(float(truth[name]), rel=1e-5), name
            else:
                assert not row[name]


class Notes(pl.loggers.CSVLogger):
    """Keeps the throughput that it is given."""

    noted = None

    def log_metrics(self, metrics, step=None):
        if "train|device|samples_per_sec" in metrics:
            self.noted = metrics


def _measure(plan, folder):
    monitor = pl.callbacks.ThroughputMonitor(
        lambda batch: len(batch["tokens"]), window_size=2, separator="|"
    )
    logger = Notes(folder)
    train_worsening(plan, folder, monitor, logger=logger, log_every_n_steps=3, max_epochs=2)
    return logger.noted


def test_throughput_counts_a_replica_once(tmp_path):
    """The ranks of a replica see the same examples; Lightning would count each of its stages."""
    found = run_ranks(4, _measure, TWO_BY_TWO, tmp_path)[0]
    own = found["train|device|samples_per_sec"]
    assert own == pytest.approx(8 * found["train|device|batches_per_sec"])
    assert found["train|samples_per_sec"] == pytest.approx(2 * own)
    alone = run_ranks(2, _measure, TWO, tmp_path)[0]
    assert "train|samples_per_sec" not in alone  # as on one device


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def _notices(plan, folder):
    heard = Heard()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(heard)
    train_worsening(plan, folder, max_epochs=1)
    return heard.lines


def test_one_replica_is_told_that_it_shares_nothing(tmp_path):
    lines = run_ranks(2, _notices, {**TWO, "replicated_tensor_sharding": True}, tmp_path)[0]
    assert len([line for line in lines if "replicated_tensor_sharding has no effect" in line]) == 1
    shared = {**TWO_BY_TWO, "replicated_tensor_sharding": True}
    lines = run_ranks(4, _notices, shared, tmp_path)[0]
    assert not [line for line in lines if "replicated_tensor_sharding" in line]
    assert any("Device Allocation" in line for line in lines)


def _ignored(plan, folder):
    heard = Heard()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(heard)
    trainer = train_worsening(plan, folder, max_epochs=1)
    trainer.validate(Worsening(), DataLoader(Sentences(12), 4), verbose=False)
    return [line for line in heard.lines if "Ignored without" in line]


def test_the_plan_of_an_ipu_config_counts_and_what_ranks_ignore_is_named_once(tmp_path):
    given = {"layers_per_ipu": [3, 3], "matmul_proportion": 0.3, "device_iterations": 2}
    plan = {"gradient_accumulation_steps": 4, "ipu_config": given, "loss_scaling": 2.0}
    line = "Ignored without IPUs: matmul_proportion, device_iterations, loss_scaling."
    assert run_ranks(2, _ignored, plan, tmp_path)[0] == [line]


def test_the_progress_bar_shows_the_loss_of_the_last_stage(tmp_path, capfd):
    run_ranks(2, _with_bar, TWO, tmp_path)
    assert "train/loss" in capfd.readouterr().out


def _with_bar(plan, folder):
    train_worsening(plan, folder, max_epochs=1, enable_progress_bar=True)
