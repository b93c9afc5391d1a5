"""Values that a module logs from wherever it likes, beside one process."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from model_helpers import make_trainer, needs_pipelining
from projects import PLANS, Project, loader_of, plan_of, table, world_of
from ranks import run_ranks
from torch import nn
from torchmetrics import MeanMetric, MetricCollection, SumMetric

pytestmark = [pytest.mark.slow, needs_pipelining]


class LoggingLoss(Project):
    """Logs in the loss, in stages, and by its weights."""

    def pipeline_loss(self, output, batch):
        kept = batch["kept"]
        losses = nn.functional.cross_entropy(output, batch["y"], reduction="none")
        loss = (losses * kept).sum() / kept.sum()
        self.log("parts/loss", loss, prog_bar=True)
        self.log("loss_on_epoch", loss.detach(), on_step=False, on_epoch=True)
        self.log_dict({"kept": kept.sum(), "most": losses.max()}, reduce_fx="sum")
        self.log("max", losses.max(), reduce_fx="max", on_step=False, on_epoch=True)
        self.log("synced", loss, sync_dist=True, batch_size=len(kept))
        return loss

    def batch_weight(self, batch):
        return batch["kept"].sum()

    def stage_forward(self, blocks, hidden, batch):
        hidden = super().stage_forward(blocks, hidden, batch)
        if self.training:
            self.log("norm", hidden.abs().mean() if "layers.1" in blocks else -1.0)
        return hidden


def kept_table(count=32):
    """Examples of which some batches lack a kept one on a replica or in a micro-batch."""
    kept = (torch.arange(count) % 5 > 1).float()
    kept[:4] = 0
    return table(count, kept=kept)


class Seen(pl.Callback):
    """What is known after every step, and at the end of an epoch."""

    def __init__(self):
        self.steps, self.epoch = [], {}

    def on_train_batch_end(self, trainer, *args):
        self.steps.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    def on_train_epoch_end(self, trainer, pl_module):
        self.epoch = {k: float(v) for k, v in trainer.callback_metrics.items()}


def logged(name, folder):
    warnings.simplefilter("ignore")
    seen = Seen()
    best = pl.callbacks.ModelCheckpoint(folder / name, monitor="parts/loss", save_top_k=1)
    trainer = make_trainer(folder, seen, best, plan=plan_of(name), max_epochs=1)
    trainer.fit(LoggingLoss(), loader_of(name, trainer, kept_table()))
    return seen.steps, seen.epoch, float(best.best_model_score)


@pytest.mark.parametrize("plan", PLANS)
def test_values_logged_in_the_loss_are_known_on_all_ranks(plan, tmp_path):
    steps, epoch, best = logged("auto", tmp_path)
    assert {"parts/loss", "loss_on_epoch", "kept", "max", "synced", "norm"} <= set(epoch)
    different = {"most"}  # the sum of the largest of micro-batches
    for found, found_epoch, found_best in run_ranks(world_of(plan), logged, plan, tmp_path):
        assert found_best == pytest.approx(best, rel=1e-5)
        for one, other in zip([*found, found_epoch], [*steps, epoch]):
            assert set(one) == set(other)
            for key in set(other) - different:
                assert one[key] == pytest.approx(other[key], rel=1e-5), key


class LoggingMetric(Project):
    def __init__(self):
        super().__init__()
        self.metric = MeanMetric()

    def pipeline_loss(self, output, batch):
        self.log("metric", self.metric)
        return super().pipeline_loss(output, batch)


@pytest.mark.usefixtures("short_grace")
def test_a_metric_in_the_loss_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(AssertionError, match=r"UserError: .*run_loss\(batch, return_output=True\)"):
        run_ranks(2, fit_metric, tmp_path)


def fit_metric(folder):
    trainer = make_trainer(folder, plan=PLANS["2x1"], max_epochs=1)
    trainer.fit(LoggingMetric(), loader_of("2x1", trainer, table()))


# --- evaluation of unequal shares -----------------------------------------------------------------


class Evaluating(Project):
    """Collectives in steps: logged values, all_gather, and a metric that synchronizes each step."""

    def __init__(self):
        super().__init__()
        self.stepwise = SumMetric(dist_sync_on_step=True)
        self.counts = MetricCollection({"examples": SumMetric(), "average": MeanMetric()})
        self.gathered, self.seen = 0, []

    def step(self, batch, prefix):
        output = self.run_output(batch)
        x, count = batch["x"], len(batch["x"])
        self.log("loss", self.pipeline_loss(output, batch), sync_dist=True, batch_size=count)
        self.log("both", x.mean(), on_step=True, on_epoch=True, sync_dist=True, batch_size=count)
        self.log("sum", float(count), on_epoch=True, sync_dist=True, reduce_fx="sum")
        self.log("highest", x.max(), on_step=True, on_epoch=True, sync_dist=True, reduce_fx="max")
        self.stepwise(torch.tensor(float(count)))
        self.counts["examples"].update(torch.tensor(float(count)))
        self.counts["average"].update(x)
        self.gathered += int(self.all_gather(torch.tensor(count)).sum())
        self.seen += x[:, 0].tolist()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.step(batch, "val")

    def test_step(self, batch, batch_idx):
        self.step(batch, "test")

    def predict_step(self, batch, batch_idx):
        self.gathered += int(self.all_gather(torch.tensor(len(batch["x"]))).sum())
        return self.run_output(batch)

    def on_validation_epoch_end(self):
        self.log_dict(dict(self.counts.compute()))
        self.log("stepwise", self.stepwise.compute())

    on_test_epoch_end = on_validation_epoch_end


class Stream(torch.utils.data.IterableDataset):
    """Without a length; divided by replicas."""

    def __init__(self, examples, trainer):
        share = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        self.indices = range(share["rank"], len(examples), share["num_replicas"])
        self.examples = examples

    def __iter__(self):
        return (self.examples[index] for index in self.indices)


def evaluated(name, folder, count, kind, verb):
    warnings.simplefilter("ignore")
    trainer, module, examples = make_trainer(folder, plan=plan_of(name)), Evaluating(), table(count)
    loader = torch.utils.data.DataLoader(
        Stream(examples, trainer) if kind == "stream" else examples, 4, shuffle=kind == "shuffled"
    )
    if verb == "predict":
        return trainer.predict(module, loader), module.gathered
    getattr(trainer, verb)(module, loader, verbose=False)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return metrics, module.gathered, module.seen


@pytest.mark.parametrize("kind", ["table", "stream", "shuffled"])
@pytest.mark.parametrize("count", [1, 2, 9, 13, 16])
@pytest.mark.parametrize("plan", ["1x2", "2x2"])
def test_collectives_of_steps_with_unequal_shares(plan, count, kind, tmp_path):
    metrics, gathered, seen = evaluated("auto", tmp_path, count, "table", "validate")
    assert gathered == metrics["sum"] == metrics["stepwise"] == metrics["examples"] == count
    results = run_ranks(world_of(plan), evaluated, plan, tmp_path, count, kind, "validate")
    for found, _, _ in results:
        assert set(found) == set(metrics)
        for key in set(metrics) - {"both_step", "highest_step"}:
            assert found[key] == pytest.approx(metrics[key], rel=1e-4), key
    firsts = results[:: world_of(plan) // 2]
    if count > 1:
        assert sorted(x for _, _, own in firsts for x in own) == sorted(seen)
    else:
        assert all(own == seen for _, _, own in firsts)  # all replicas evaluate all of it


@pytest.mark.parametrize("count", [1, 9])
def test_collectives_of_predictions_with_unequal_shares(count, tmp_path):
    expected, _ = evaluated("auto", tmp_path, count, "table", "predict")
    results = run_ranks(4, evaluated, "2x2", tmp_path, count, "table", "predict")
    rows = [row for found, _ in (results[0], results[2]) for part in found for row in part.tolist()]
    expected_rows = [row for part in expected for row in part.tolist()]
    torch.testing.assert_close(torch.tensor(sorted(rows)), torch.tensor(sorted(expected_rows)))


class TwoLoaders(Evaluating):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("examples", float(len(batch["x"])), reduce_fx="sum", sync_dist=True, on_epoch=True)
        self.all_gather(batch["x"].mean())

    def on_validation_epoch_end(self):
        self.all_gather(torch.ones(()))


def evaluated_twice(name, folder):
    warnings.simplefilter("ignore")
    trainer = make_trainer(folder, plan=plan_of(name))
    loaders = [torch.utils.data.DataLoader(table(count), 4) for count in (13, 1)]
    trainer.validate(TwoLoaders(), loaders, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_one_of_several_loaders_with_fewer_examples_than_replicas(tmp_path):
    expected = evaluated_twice("auto", tmp_path)
    assert sorted(expected.values()) == [1.0, 13.0]
    assert run_ranks(2, evaluated_twice, "1x2", tmp_path) == [expected] * 2
