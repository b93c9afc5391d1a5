"""What changes while a program is compiled counts, or is refused; modes select a program."""

import re

import lightning.pytorch as pl
import pytest
import torch
from ipu_runs import ipu_strategy, ipu_trainer, loader, plain_trainer
from language_model import LanguageModel, Sentences
from models import GLOBAL_BATCH
from torch import nn

from lightning_ipu_bert import UserError

DATA = Sentences(3 * GLOBAL_BATCH)


def validation_loss(module):
    """In one process, in evaluation mode."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    batch = {"tokens": DATA.tokens[:8]}
    with torch.no_grad():
        hidden = module.stage_forward(module.pipeline_blocks(), None, batch)
        loss = float(module.pipeline_loss(hidden, batch))
    for part, training in modes.items():
        part.training = training
    return loss


class Noisy(LanguageModel):
    """Runs its blocks before the training, in training mode and without gradients."""

    def __init__(self):
        super().__init__(dropout=0.3)
        self.noisy, self.found = [], []

    def on_train_epoch_start(self):
        with torch.no_grad():
            batch = {"tokens": DATA.tokens[:8]}
            for _ in range(2):
                self.noisy.append(float(self.pipeline_loss(self.run_output(batch), batch)))

    def validation_step(self, batch, batch_idx):
        self.found.append(float(self.pipeline_loss(self.run_output(batch), batch)))


def test_evaluation_is_deterministic_whatever_was_compiled_first(tmp_path):
    module = Noisy()
    trainer = ipu_trainer(tmp_path)
    trainer.fit(module, loader(DATA), loader(Sentences(8), replicas=2))
    assert module.noisy[0] != module.noisy[1]  # dropout
    assert module.found == pytest.approx([validation_loss(module)], rel=1e-4)


class Uncertain(LanguageModel):
    """Predicts with dropout, on purpose."""

    def __init__(self):
        super().__init__(dropout=0.3)

    def on_predict_start(self):
        self.train()

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.run_output(batch)


def test_a_module_in_training_mode_predicts_with_dropout(tmp_path):
    first, second = (ipu_trainer(tmp_path).predict(Uncertain(), loader(DATA))[0] for _ in range(2))
    module = Uncertain()
    one, two = ipu_trainer(tmp_path).predict(module, [loader(DATA), loader(DATA)])
    assert not torch.equal(one[0], two[0])
    assert first.shape == second.shape


class Buffered(LanguageModel):
    """Fills a buffer in a block, and one outside, with every epoch."""

    def __init__(self):
        super().__init__()
        self.head.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.losses = []

    def on_train_epoch_start(self):
        self.head.shift.fill_(self.current_epoch * 0.3)
        self.scale.fill_(1 + self.current_epoch)

    def pipeline_loss(self, output, batch):
        output = (output + self.head.shift * output.detach().mean(-1, keepdim=True)) * self.scale
        return super().pipeline_loss(output, batch)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss.detach()))
        return loss


def fitted(trainer, module, **more):
    torch.manual_seed(3)
    trainer.fit(module, loader(DATA, **more))
    return module


def test_buffers_and_weights_that_are_changed_on_the_host_count(tmp_path):
    torch.manual_seed(3)
    expected = Buffered()
    torch.manual_seed(3)
    found = Buffered()
    fitted(plain_trainer(tmp_path, max_epochs=3), expected, replicas=1)
    fitted(ipu_trainer(tmp_path, max_epochs=3), found)
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    for name, value in expected.state_dict().items():
        assert torch.allclose(found.state_dict()[name], value, atol=1e-4), name


class Filling(Buffered):
    def on_predict_batch_start(self, batch, batch_idx):
        self.scale.fill_(1 + batch_idx)

    def predict_step(self, batch, batch_idx):
        return self.run_output(batch)

    def stage_forward(self, blocks, hidden, batch):
        hidden = super().stage_forward(blocks, hidden, batch)
        return hidden * self.scale if "head" in blocks else hidden


def test_buffers_that_are_changed_between_predictions_count(tmp_path):
    module = Filling()
    expected = plain_trainer(tmp_path).predict(module, loader(DATA, replicas=2))
    found = ipu_trainer(tmp_path).predict(module, loader(DATA, replicas=2))
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-4, atol=1e-5)


class Changing(LanguageModel):
    """Changes something in its second epoch."""

    change = None

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.change()

    def pipeline_loss(self, output, batch):
        return super().pipeline_loss(output * self.factor, batch)

    factor = 1.0

    def __init__(self):
        super().__init__(dropout=0.1)
        self.factor = 1.0
        self.head.register_buffer("shift", torch.zeros(()))


def set_rate(self):
    self.layers[0].dropout.p = 0.5


def set_factor(self):
    self.factor = 2.0


def freeze(self):
    self.layers[0].requires_grad_(False)


def set_mode(self):
    self.layers[1].eval()


def add_group(self):
    self.optimizers().add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def replace_buffer(self):
    self.head.shift = torch.ones(())


REFUSED = {
    replace_buffer: r"head.shift was replaced by another tensor, which is not in the compiled",
    set_rate: r"layers.0.dropout.p has changed to 0.5, but the program was compiled with 0.1",
    set_factor: r"Changing.factor has changed to 2.0, but the program was compiled with 1.0",
    freeze: r"requires_grad of layers.0.* has changed to False",
    set_mode: r"layers.1 is in evaluation mode, but the training program was compiled with",
    add_group: r"The optimizer has groups of \[\d+, 1\] parameters, but the training program",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_changes_that_a_program_cannot_see_are_refused(change, tmp_path):
    module = Changing()
    module.change = lambda: change(module)
    with pytest.raises(UserError, match=REFUSED[change]) as error:
        ipu_trainer(tmp_path, max_epochs=2).fit(module, loader(DATA))
    assert "\n" not in str(error.value)


# --- outputs, losses and logged values ------------------------------------------------------------


class Outputting(LanguageModel):
    """Takes the output of the training step, with a scalar in it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def stage_forward(self, blocks, hidden, batch):
        hidden = super().stage_forward(blocks, hidden, batch)
        return {"logits": hidden, "mean": hidden.mean()} if "head" in blocks else hidden

    def pipeline_loss(self, output, batch):
        weight = torch.ones((), device=self.device)
        return super().pipeline_loss(output["logits"], batch) * weight

    def training_step(self, batch, batch_idx):
        loss, output = self.run_loss(batch, return_output=True)
        assert not output["logits"].requires_grad
        self.seen.append((float(loss.detach()), output["logits"], float(output["mean"])))
        return loss

    def predict_step(self, batch, batch_idx):
        return self.run_output(batch)


@pytest.mark.parametrize("iterations", [1, 3])
def test_outputs_of_training_are_those_of_the_whole_batch(iterations, tmp_path):
    torch.manual_seed(3)
    expected = Outputting()
    torch.manual_seed(3)
    found = Outputting()
    fitted(plain_trainer(tmp_path), expected, replicas=1)
    strategy = ipu_strategy(ipu_config={"device_iterations": iterations})
    fitted(ipu_trainer(tmp_path, strategy=strategy), found)
    for column in (0, 2):
        truth = torch.tensor([step[column] for step in expected.seen]).reshape(-1, iterations)
        values = torch.tensor([step[column] for step in found.seen])
        torch.testing.assert_close(values, truth.mean(1), rtol=1e-4, atol=1e-5)
    logits = torch.cat([step[1] for step in found.seen])
    torch.testing.assert_close(
        logits, torch.cat([step[1] for step in expected.seen]), rtol=1e-3, atol=1e-4
    )


def test_a_scalar_in_the_output_is_a_mean_over_micro_batches(tmp_path):
    torch.manual_seed(3)
    module = Outputting()
    (found,) = ipu_trainer(tmp_path).predict(module, loader(Sentences(8)))
    (expected,) = plain_trainer(tmp_path).predict(module, loader(Sentences(8)))
    assert found["mean"].shape == ()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Late(LanguageModel):
    def training_step(self, batch, batch_idx):
        result = self.run_loss(batch, return_output=batch_idx == 1)
        return result[0] if batch_idx == 1 else result


class VectorLoss(LanguageModel):
    def pipeline_loss(self, output, batch):
        return super().pipeline_loss(output, batch).repeat(2)


class LoggingLoss(LanguageModel):
    def pipeline_loss(self, output, batch):
        loss = super().pipeline_loss(output, batch)
        self.log("inner", loss)
        return loss


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Late, "Pass return_output=True in every training step"),
        (VectorLoss, r"VectorLoss.pipeline_loss returns shape \[2\], but must return a scalar"),
        (LoggingLoss, r"self.log\('inner'\) in pipeline_loss .* would log a constant on IPUs"),
    ],
)
def test_what_a_trace_cannot_show_is_refused(kind, message, tmp_path):
    with pytest.raises(UserError, match=message):
        ipu_trainer(tmp_path).fit(kind(), loader(DATA))


def test_a_vector_loss_is_refused_in_one_process(tmp_path):
    with pytest.raises(UserError, match=r"returns shape \[2\]"):
        plain_trainer(tmp_path).fit(VectorLoss(), loader(DATA))


# --- counters -------------------------------------------------------------------------------------


class Rows(pl.loggers.CSVLogger):
    def __init__(self, folder):
        super().__init__(folder)
        self.steps = []

    def log_metrics(self, metrics, step=None):
        if "train/loss" in metrics:
            self.steps.append(step)


@pytest.mark.parametrize(("iterations", "steps"), [(4, [51, 103]), (8, [55, 111])])
def test_the_default_logging_interval_is_rounded_up_to_calls(iterations, steps, tmp_path):
    logger = Rows(tmp_path)
    strategy = ipu_strategy(ipu_config={"device_iterations": iterations})
    trainer = ipu_trainer(tmp_path, strategy=strategy, logger=logger, max_epochs=-1, max_steps=112)
    trainer.fit(LanguageModel(width=4), loader(Sentences(8 * GLOBAL_BATCH)))
    assert logger.steps == steps
    assert trainer.log_every_n_steps == 50


@pytest.mark.parametrize(("dev", "steps"), [(True, 4), (2, 8)])
def test_a_dev_run_is_calls(dev, steps, tmp_path):
    strategy = ipu_strategy(ipu_config={"device_iterations": 4})
    trainer = ipu_trainer(tmp_path, strategy=strategy, fast_dev_run=dev)
    trainer.fit(LanguageModel(), loader(Sentences(8 * GLOBAL_BATCH)))
    assert trainer.global_step == steps
    assert re.match("finished", trainer.state.status)
