"""Metrics, writers, weights and BatchNorm in modules and callbacks that know nothing of stages."""

import warnings
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from model_helpers import make_trainer, needs_pipelining
from projects import BATCH, PLANS, Project, assert_close, fit, fit_ranks, loader_of, table, world_of
from ranks import run_ranks
from torch import nn
from torchmetrics import CatMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from lightning_ipu_bert import UserError
from lightning_ipu_bert.strategies.distributed.micro_batches import micro_batches_of

pytestmark = [pytest.mark.slow, needs_pipelining]


class Measuring(Project):
    """Counts and collects the examples of an evaluation in all the ways there are."""

    def __init__(self):
        super().__init__()
        self.count, self.values = SumMetric(), CatMetric()
        self.group = MetricCollection({"matrix": MulticlassConfusionMatrix(3)})
        self.others = {"counts": [SumMetric()]}  # not a submodule
        self.found = {}

    def validation_step(self, batch, batch_idx):
        output = self.run_output(batch)
        self.count.update(torch.ones(len(batch["y"])))
        self.values.update(batch["x"][:, 0])
        self.others["counts"][0].update(len(batch["y"]))
        self.group.update(output, batch["y"])
        self.log("count", self.count, on_epoch=True)
        self.log("sum", float(len(batch["y"])), sync_dist=True, reduce_fx="sum", on_epoch=True)
        self.log("mean", batch["x"].mean(), sync_dist=True, on_epoch=True, batch_size=len(output))

    def on_validation_epoch_end(self):
        self.found = {
            "values": sorted(self.values.compute().tolist()),
            "other": self.others["counts"][0].compute().item(),
            "matrix": self.group.compute()["matrix"].tolist(),
            "gathered": self.all_gather(torch.ones(3)).sum().item() / self.replicas,
        }

    @property
    def replicas(self):
        return (self.trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]


def validated(name, folder):
    warnings.simplefilter("ignore")
    module, examples = Measuring(), table(64)
    trainer = make_trainer(folder, plan=PLANS.get(name))
    trainer.validate(module, loader_of(name, trainer, examples), verbose=False)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert module.count.dist_sync_fn is None  # as before the run
    return metrics, module.found


@pytest.mark.parametrize("name", PLANS)
def test_metrics_count_an_example_once(name, tmp_path):
    metrics, found = validated("auto", tmp_path)
    assert metrics["count"] == metrics["sum"] == 64
    for rank_metrics, rank_found in run_ranks(world_of(name), validated, name, tmp_path):
        assert rank_metrics == pytest.approx(metrics, rel=1e-5)
        assert rank_found.pop("values") == pytest.approx(found["values"])
        assert rank_found == {key: found[key] for key in rank_found}


class Writer(BasePredictionWriter):
    """Writes the examples of a batch, and of an epoch, to files of its own."""

    def __init__(self, folder):
        super().__init__("batch_and_epoch")
        self.folder = folder

    def write_on_batch_end(self, trainer, module, prediction, indices, batch, batch_idx, *args):
        torch.save(prediction, self.folder / f"{trainer.global_rank}-{batch_idx}.batch")

    def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
        torch.save(torch.cat(predictions), self.folder / f"{trainer.global_rank}.epoch")


class Predicting(Project):
    def predict_step(self, batch, batch_idx):
        self.run_output(batch)
        return batch["x"][:, 0]


def predicted(name, folder):
    warnings.simplefilter("ignore")
    writer = Writer(folder)
    trainer = make_trainer(folder, writer, plan=PLANS.get(name))
    trainer.predict(Predicting(), loader_of(name, trainer, table(64)))
    return type(writer) is Writer


@pytest.mark.parametrize("name", ["auto", *PLANS])
def test_writers_write_every_example_once(name, tmp_path):
    assert run_ranks(world_of(name), predicted, name, tmp_path) == [True] * world_of(name)
    expected = sorted(table(64).columns["x"][:, 0].tolist())
    for kind in ("batch", "epoch"):
        parts = [torch.load(file, weights_only=True) for file in tmp_path.glob(f"*.{kind}")]
        assert sorted(torch.cat(parts).tolist()) == expected


class Saving(Project):
    """Saves its weights at the end, as they are, and in the middle."""

    def __init__(self):
        super().__init__()
        self.at_end, self.middle = {}, None

    def on_train_batch_end(self, *args):
        self.middle = [value.is_meta for value in self.state_dict().values()]

    def on_train_end(self):
        self.at_end = {name: value.clone() for name, value in self.state_dict().items()}


def saved(name, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with patch("warnings.simplefilter"):
            _, state, at_end = fit(name, folder, Saving, None, lambda module: module.at_end)
    return state, at_end, [str(w.message) for w in caught if "state_dict" in str(w.message)]


def test_weights_are_whole_at_the_end_of_training(tmp_path):
    _, expected, _ = fit("auto", tmp_path, Saving)
    results = run_ranks(4, saved, "2x2", tmp_path)
    for state, at_end, _ in results:
        assert_close([state, at_end], expected)
    (line,) = results[0][2]
    assert "Save them by trainer.save_checkpoint" in line


class Normalizing(Project):
    def __init__(self):
        super().__init__()
        self.layers[0] = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))


def statistics(module):
    return [b.clone() for b in module.buffers()]


def test_recomputation_updates_statistics_once(tmp_path):
    runs = [run_ranks(2, fit, name, tmp_path, Normalizing) for name in ("2x1", "recomputed")]
    for (losses, state, _), (others, other_state, _) in zip(*runs):
        assert losses == others
        assert all(torch.equal(value, other_state[name]) for name, value in state.items())
        assert state["layers.0.1.num_batches_tracked"] == 8  # 4 updates of 2 micro-batches


def test_synchronized_statistics_are_refused(tmp_path):
    with pytest.raises(UserError, match="sync_batchnorm=True is not supported in a pipeline"):
        fit("2x1", tmp_path, Normalizing, sync_batchnorm=True)


@pytest.mark.parametrize(("examples", "steps", "sizes"), [(7, 2, [3, 3]), (5, 4, [2, 2])])
def test_no_micro_batch_of_batch_norm_has_one_example(examples, steps, sizes):
    batch = {"x": torch.arange(examples), "name": [str(i) for i in range(examples)]}
    with pytest.warns(UserWarning, match=f"A batch of {examples} examples .* the last 1 of it"):
        parts = micro_batches_of(batch, steps, least=2).parts
    assert [len(part["x"]) for part in parts] == sizes
    assert [part["name"] for part in micro_batches_of(batch, steps).parts][-1][-1] == str(
        examples - 1
    )


def test_a_ragged_batch_trains_with_batch_norm(tmp_path):
    examples = table(BATCH + 3)
    for losses, _, _ in fit_ranks("2x1", tmp_path, Normalizing, examples):
        assert len(losses) == 2
        assert all(torch.isfinite(torch.tensor(losses)))
