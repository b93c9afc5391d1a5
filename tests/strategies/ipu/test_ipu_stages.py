"""What users of a Trainer rely on, on IPUs: fit, validate, test, predict, one after the other."""

import lightning.pytorch as pl
import pytest
import torch
from ipu_runs import (
    ipu_strategy,
    ipu_trainer,
    loader,
    plain_trainer,
    with_adamw,
)
from language_model import LanguageModel, Sentences
from models import GLOBAL_BATCH

pytestmark = pytest.mark.slow


def test_fit_validate_and_fit_again(tmp_path):
    module, examples = with_adamw("bert")
    trainer = ipu_trainer(tmp_path, num_sanity_val_steps=2)
    trainer.fit(module, loader(examples), loader(examples))
    after_fit = float(trainer.callback_metrics["val/loss"])
    assert trainer.validate(module, loader(examples), verbose=False)[0]["val/loss"] == (
        pytest.approx(after_fit)
    )
    trainer = ipu_trainer(tmp_path)
    trainer.fit(module, loader(examples), loader(examples))
    assert float(trainer.callback_metrics["val/loss"]) < after_fit


@pytest.mark.parametrize("flag", [{"fast_dev_run": 2}, {"overfit_batches": 1}, {"max_steps": 2}])
def test_flags_of_the_trainer(flag, tmp_path):
    module, examples = with_adamw("bert")
    trainer = ipu_trainer(tmp_path, **flag)
    trainer.fit(module, loader(examples), loader(examples))
    assert trainer.global_step == next(iter(flag.values()))


class EveryStage(LanguageModel):
    """Each stage logs and returns a value of its own."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/one", 1.0)
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        return torch.tensor(2.0)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.run_loss(batch))
        return torch.tensor(3.0)

    def predict_step(self, batch, batch_idx):
        return self.run_output(batch).argmax(-1)


def test_every_stage_of_a_trainer_runs(tmp_path):
    torch.manual_seed(0)
    module, data = EveryStage(), Sentences(2 * GLOBAL_BATCH)
    fresh = EveryStage()
    fresh.load_state_dict(module.state_dict())
    for inference in ("validate", "test", "predict"):  # without a fit before
        getattr(ipu_trainer(tmp_path, fast_dev_run=True), inference)(module, loader(data))
    trainer = ipu_trainer(tmp_path)
    trainer.fit(module, loader(data), loader(data))
    tested = trainer.test(module, loader(data), verbose=False)[0]["test/loss"]
    plain = plain_trainer(tmp_path)
    plain.fit(fresh, loader(data, 1), loader(data, 1))
    assert tested == pytest.approx(plain.test(fresh, loader(data), verbose=False)[0]["test/loss"])
    predicted = torch.cat(trainer.predict(module, loader(data)))
    expected = torch.cat(plain.predict(fresh, loader(data)))
    assert (predicted == expected).float().mean() > 0.99  # ties may fall either way


def test_each_stage_gives_its_own_values(tmp_path):
    seen = {}

    class Look(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, *args):
            seen["validation"] = float(outputs)

        def on_test_batch_end(self, trainer, pl_module, outputs, *args):
            seen["test"] = float(outputs)

        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            seen["train"] = float(trainer.callback_metrics["train/one"])

    data = Sentences(GLOBAL_BATCH)
    trainer = ipu_trainer(tmp_path, Look())
    trainer.fit(EveryStage(), loader(data), loader(data))
    trainer.test(EveryStage(), loader(data), verbose=False)
    assert seen == {"train": 1.0, "validation": 2.0, "test": 3.0}


class Indices(pl.callbacks.BasePredictionWriter):
    """Keeps which examples Lightning says were in each batch."""

    def __init__(self):
        super().__init__("batch")
        self.seen = []

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, *args):
        assert len(batch_indices) == len(batch["tokens"])
        self.seen += batch_indices


@pytest.mark.parametrize("mode", ["sync", "async", "async_rebatched"])
def test_predictions_know_their_examples(mode, tmp_path):
    indices, data = Indices(), Sentences(13)
    trainer = ipu_trainer(tmp_path, indices, strategy=ipu_strategy(loader_mode=mode))
    trainer.predict(EveryStage(), loader(data))
    assert indices.seen == list(range(13))


def test_loaders_have_the_options_of_their_graph(tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            for found in (trainer.train_dataloader, trainer.val_dataloaders):
                seen.append((found.options.replication_factor, found.options.device_iterations))

    plan = {"ipu_config": {"device_iterations": 2, "inference_replication_factor": 1}}
    trainer = ipu_trainer(tmp_path, Look(), strategy=ipu_strategy(**plan))
    data = Sentences(2 * GLOBAL_BATCH)
    trainer.fit(LanguageModel(), loader(data), loader(data))
    assert seen == [(2, 2), (1, 2)]


def test_transfer_hooks_run_on_the_host(tmp_path):
    class Shifts(LanguageModel):
        moved = 0

        def on_after_batch_transfer(self, batch, dataloader_idx):
            type(self).moved += 1
            return {"tokens": (batch["tokens"] + 1) % 31}

    ipu_trainer(tmp_path).fit(Shifts(), loader(Sentences(2 * GLOBAL_BATCH)))
    assert Shifts.moved == 2


def test_inputs_are_cast_on_the_host_if_they_are_floats(tmp_path):
    strategy = ipu_trainer(tmp_path, precision="16-true").strategy
    batch = {"float": torch.ones(1), "double": torch.ones(1).double(), "long": torch.ones(1).long()}
    cast = strategy.precision_plugin.convert_input(batch)
    assert [t.dtype for t in cast.values()] == [torch.float16, torch.float16, torch.int64]
