"""What Lightning's users rely on, on IPUs: counting, evaluation, logging, and few copies."""

import lightning.pytorch as pl
import poptorch
import pytest
import torch
from ipu_runs import (
    Losses,
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
from models import GLOBAL_BATCH, make_model
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from lightning_ipu_bert import IPUStrategy, PipelineModule, UserError

COUNTS = poptorch.device.COUNTS


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


# --- data -----------------------------------------------------------------------------------------


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
    assert "204 of 88,524 training examples are left out of each epoch" in caplog.text
    assert "Total optimization steps: 690" in caplog.text


def test_10570_questions_in_10570_answers_out(tmp_path):
    data, module = Numbered(10_570, 5), Tagger()
    trainer = ipu_trainer(tmp_path, strategy=pod16())
    parts = trainer.predict(module, DataLoader(data, batch_size=128))
    assert len(parts) == 331  # of 32: micro-batches of 2 x 4 iterations x 4 replicas
    assert torch.cat([part["number"] for part in parts]).tolist() == list(range(10_570))
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
    with pytest.raises(UserError, match=r"15 examples, and one call of the IPUs takes 16 \(2 x"):
        ipu_trainer(tmp_path).fit(module, loader(examples.tokens[:15]))


def test_examples_of_another_length_are_refused(tmp_path):
    examples = ConcatDataset([Sentences(16), Sentences(16, length=9)])
    with pytest.raises(UserError, match=r"shape \[9\] .* the program was compiled for \[13\]"):
        ipu_trainer(tmp_path).validate(LanguageModel(), loader(examples))


# --- weights travel as rarely as they can ---------------------------------------------------------


@pytest.mark.parametrize("ipus_of_machine", [4, 16])
def test_weights_come_to_the_host_twice_an_epoch_at_most_and_never_for_a_step(
    ipus_of_machine, ipus, tmp_path
):
    ipus.size = ipus_of_machine  # 4 hold one program, 16 hold both
    module, examples = with_adamw("bert", updates=6)
    copies = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *args):
            copies.append(COUNTS["to_host"])

    keeper = ModelCheckpoint(tmp_path / "kept", save_top_k=-1)
    trainer = ipu_trainer(tmp_path, Look(), keeper, max_epochs=2, num_sanity_val_steps=2)
    trainer.fit(module, loader(examples), loader(examples))
    assert copies[:6] == [0] * 6
    assert len(set(copies[6:])) == 1
    assert 1 <= copies[6] <= 2
    assert COUNTS["to_host"] - copies[-1] <= 2
    assert COUNTS["compilations"] == 2


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


def test_a_module_that_clears_gradients_itself_copies_no_weights(tmp_path):
    class Clears(LanguageModel):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=True)

    ipu_trainer(tmp_path).fit(Clears(), loader(Sentences(3 * GLOBAL_BATCH)))
    assert COUNTS["to_host"] == 1  # at the end


def test_whoever_reads_a_weight_gets_todays(tmp_path):
    module, examples = with_adamw("bert")
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(pl_module.qa_outputs.weight.detach().clone())

    ipu_trainer(tmp_path, Look()).fit(module, loader(examples))
    assert all((a != b).any() for a, b in zip(seen, seen[1:]))
    torch.testing.assert_close(seen[-1], module.qa_outputs.weight.detach())


def test_the_optimizer_is_sent_when_a_number_has_changed_and_only_then(tmp_path):
    module, examples = make_model("language model")
    ipu_trainer(tmp_path).fit(module, loader(examples))
    assert COUNTS["set_optimizer"] == 1  # PopTorch does so when a program is made
    COUNTS.clear()
    module, examples = with_adamw("language model")
    ipu_trainer(tmp_path).fit(module, loader(examples))
    assert COUNTS["set_optimizer"] == 3  # the first of three updates has the first rate


@pytest.mark.parametrize("ipus_of_machine", [4, 16])
def test_programs_take_turns_on_too_few_ipus(ipus_of_machine, ipus, tmp_path):
    ipus.size = ipus_of_machine  # 4 hold one program, 16 hold both
    plain, ours = [], []
    for losses, make in ((plain, plain_trainer), (ours, ipu_trainer)):
        module, examples = with_adamw("bert", updates=4)
        keeper = Losses()
        trainer = make(tmp_path, keeper, val_check_interval=2, num_sanity_val_steps=1)
        replicas = 1 if make is plain_trainer else 2
        trainer.fit(module, loader(examples, replicas), loader(examples, replicas))
        losses += [*keeper.losses, float(trainer.callback_metrics["val/loss"])]
    assert ours == pytest.approx(plain, rel=1e-5)
    assert ipus.held == 0


def test_the_module_is_as_it_was_but_trained(tmp_path):
    module, examples = with_adamw("bert")
    before = {name: id(p) for name, p in module.named_parameters()}
    ipu_trainer(tmp_path).fit(module, loader(examples), loader(examples))
    assert {name: id(p) for name, p in module.named_parameters()} == before
    assert {type(p) for p in module.parameters()} == {nn.Parameter}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
    assert module.device == torch.device("cpu")
    assert module._executor is None


# --- every stage of a Trainer ---------------------------------------------------------------------


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


# --- several updates a call -----------------------------------------------------------------------


def test_device_iterations_are_counted_as_updates(tmp_path):
    module, examples = with_adamw("bert", updates=4)
    losses = Losses()
    logger = CSVLogger(tmp_path, name="logs")
    keeper = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_top_k=-1)
    strategy = ipu_strategy(ipu_config={"device_iterations": 2})
    trainer = ipu_trainer(
        tmp_path, losses, keeper, strategy=strategy, logger=logger, log_every_n_steps=2
    )
    trainer.fit(module, loader(examples))
    assert losses.steps == [2, 4]
    # The rate of a call is that of its first update: updates 0 and 2 of 1 / (1 + step).
    assert losses.rates == pytest.approx([1e-2 / 3, 1e-2 / 5])
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == [
        "epoch=0-step=2.ckpt",
        "epoch=0-step=4.ckpt",
        "ipu_config.json",
    ]
    text = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    step = text[0].split(",").index("step")
    assert [int(line.split(",")[step]) for line in text[1:]] == [1, 3]


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


# --- more of lightning-graphcore's checklist ------------------------------------------------------


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
