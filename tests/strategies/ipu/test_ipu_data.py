"""Every example once, on IPUs too, and what batches must be like."""

import lightning.pytorch as pl
import pytest
import torch
from ipu_runs import (
    ipu_strategy,
    ipu_trainer,
    loader,
    plain_trainer,
)
from language_model import LanguageModel, Sentences
from models import make_model
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from lightning_ipu_bert import IPUStrategy, PipelineModule, UserError


class Tagger(PipelineModule, pl.LightningModule):
    """One table: as fast as a module can be."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(31, 2)
        self.seen = []

    def pipeline_blocks(self):
        return ["table"]

    def stage_forward(self, blocks, hidden, batch):
        return {"scores": self.table(batch["tokens"]).sum(1), "number": batch["number"] + 0}

    def pipeline_loss(self, output, batch):
        return output["scores"].square().mean()

    def training_step(self, batch, batch_idx):
        return self.run_loss(batch)

    def validation_step(self, batch, batch_idx):
        output = self.run_output(batch)
        self.seen += batch["number"].tolist()
        self.log("val/loss", self.pipeline_loss(output, batch))

    def predict_step(self, batch, batch_idx):
        return self.run_output(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Numbered(Sentences):
    def __getitem__(self, index):
        return {"tokens": self.tokens[index], "number": torch.tensor(index)}


POD16 = {"layers_per_stage": [-1], "replication_factor": 4, "gradient_accumulation_steps": 64}
EVALUATE_16 = {"inference_device_iterations": 4, "inference_replication_factor": 4}


def pod16(**changes):
    return IPUStrategy(**{**POD16, **changes}, ipu_config=EVALUATE_16)


def test_training_on_squads_88524_features_takes_690_updates_and_says_what_it_drops(
    tmp_path, capsys, caplog
):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True
            self.batches = trainer.num_training_batches

    stop, module = Stop(), Tagger()
    trainer = ipu_trainer(tmp_path, stop, strategy=pod16(), max_epochs=2)
    trainer.fit(module, DataLoader(Numbered(88_524, 5), batch_size=64))
    assert stop.batches == 345
    assert "204 of 88,524 training examples are dropped in each epoch" in caplog.text
    assert "Total optimization steps: 690" in caplog.text


@pytest.mark.parametrize(("examples", "calls"), [(10_784, 337), (10_570, 331)])
def test_10570_questions_in_10570_answers_out(examples, calls, tmp_path):
    """Micro-batches of 2, 4 iterations, 4 replicas: 32 a call."""
    data, module = Numbered(examples, 5), Tagger()
    trainer = ipu_trainer(tmp_path, strategy=pod16())
    parts = trainer.predict(module, DataLoader(data, batch_size=128))
    assert [len(part["number"]) for part in parts[:-1]] == [32] * (calls - 1)
    assert torch.cat([part["number"] for part in parts]).tolist() == list(range(examples))
    with torch.no_grad():
        expected = module.table(data.tokens).sum(1)
    torch.testing.assert_close(torch.cat([part["scores"] for part in parts]), expected)


@pytest.mark.parametrize("examples", [1, 7, 16, 33])
def test_validation_sees_every_example_once_and_its_loss_is_that_of_one_process(examples, tmp_path):
    results = []
    for make in (plain_trainer, ipu_trainer):
        torch.manual_seed(1)
        module = Tagger()
        data = DataLoader(Numbered(examples), batch_size=16)
        ipu = {"strategy": ipu_strategy(layers_per_stage=[-1])} if make is ipu_trainer else {}
        results.append(make(tmp_path, **ipu).validate(module, data, verbose=False)[0])
        assert module.seen == list(range(examples))
    assert results[0] == pytest.approx(results[1])


def test_too_few_data_are_refused(tmp_path):
    module, examples = make_model("language model", updates=1)
    with pytest.raises(UserError, match=r"15 examples, but one call of the IPUs needs 16 \(2 x"):
        ipu_trainer(tmp_path).fit(module, loader(examples.tokens[:15]))


def test_examples_of_another_length_are_refused(tmp_path):
    examples = ConcatDataset([Sentences(16), Sentences(16, length=9)])
    with pytest.raises(UserError, match=r"shape \[9\] .* the program was compiled for \[13\]"):
        ipu_trainer(tmp_path).validate(LanguageModel(), loader(examples))


def test_entries_of_batches_are_told_apart_by_name(tmp_path):
    module = LanguageModel()
    other = [
        {"a": torch.ones(8, 2), "tokens": Sentences(8).tokens},
        {"tokens": Sentences(8).tokens, "a": torch.ones(8, 2)},
    ]
    ipu_trainer(tmp_path).validate(module, DataLoader(other, batch_size=None))
    other[1]["b"] = other[1].pop("a")
    with pytest.raises(UserError, match="has other entries than the first one"):
        ipu_trainer(tmp_path).validate(module, DataLoader(other, batch_size=None))
