"""Modules, loaders and settings of other projects on IPUs: they work, or one line says why not."""

import logging
from contextlib import suppress

import lightning.pytorch as pl
import poptorch
import pytest
import torch
from ipu_runs import check_weights, ipu_strategy, ipu_trainer, loader, plain_trainer, weights_of
from language_model import LanguageModel, Sentences
from models import GLOBAL_BATCH
from torch import nn

from lightning_ipu_bert import UserError
from lightning_ipu_bert.strategies.ipu.precision import IPUPrecision

DATA = Sentences(3 * GLOBAL_BATCH)


class Normalizing(LanguageModel):
    """A block with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.layers[2] = nn.Sequential(
            nn.Flatten(0, 1), nn.BatchNorm1d(16), nn.Unflatten(0, (-1, 12))
        )

    def stage_forward(self, blocks, hidden, batch):
        for name in blocks:
            own = name == "layers.2"
            hidden = self.layers[2](hidden) if own else super().stage_forward([name], hidden, batch)
        return hidden


def test_batch_norm_with_replicas_names_what_to_do_beforehand(tmp_path):
    message = r"Normalizing.layers.2.1 updates .* edit_options=.*broadcastBuffers\(False\)"
    with pytest.raises(UserError, match=message) as error:
        ipu_trainer(tmp_path).fit(Normalizing(), loader(DATA))
    assert "\n" not in str(error.value)
    assert poptorch.device.COUNTS["compilations"] == 0


def test_batch_norm_trains_as_that_line_says_and_without_replicas(tmp_path):
    strategy = ipu_strategy(edit_options=lambda options, training: options.broadcastBuffers(False))
    ipu_trainer(tmp_path, strategy=strategy).fit(Normalizing(), loader(DATA))
    alone = ipu_strategy(replication_factor=1)
    ipu_trainer(tmp_path, strategy=alone).fit(Normalizing(), loader(DATA, replicas=1))


def own_loader(strategy, training=True):
    options = strategy.poptorch_options(training)
    return poptorch.DataLoader(options, DATA, batch_size=2, drop_last=training)


def test_a_poptorch_loader_of_the_user_trains_with_the_options_of_the_strategy(tmp_path):
    torch.manual_seed(3)
    expected = LanguageModel()
    torch.manual_seed(3)
    module = LanguageModel()
    ipu_trainer(tmp_path).fit(expected, loader(DATA))
    strategy = ipu_strategy()
    ipu_trainer(tmp_path, strategy=strategy).fit(module, own_loader(strategy))
    check_weights(weights_of(module), weights_of(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replication_factor": 1}, r"replicationFactor\(1\) differ from 2"),
        ({"gradient_accumulation_steps": 8}, r"gradientAccumulation\(8\) differ from 4"),
        ({"ipu_config": {"device_iterations": 2}}, r"deviceIterations\(2\) differ from 1"),
    ],
)
def test_a_poptorch_loader_with_other_options_is_refused(change, message, tmp_path):
    trainer = ipu_trainer(tmp_path)
    with pytest.raises(UserError, match=f"{message} .*poptorch_options") as error:
        trainer.fit(LanguageModel(), own_loader(ipu_strategy(**change)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, -2.0, float("inf"), float("nan")])
def test_impossible_loss_scalings_are_refused(value):
    with pytest.raises(UserError, match=f"loss_scaling={value!r} must be above 0 and finite"):
        ipu_strategy(loss_scaling=value)


def test_impossible_precisions_of_the_plugin_are_refused():
    with pytest.raises(UserError, match="precision='16-mixed' is unknown"):
        IPUPrecision("16-mixed")


def test_several_nodes_are_refused(tmp_path):
    with pytest.raises(UserError, match="num_nodes=2 must be 1 on IPUs, whose processes are"):
        ipu_trainer(tmp_path, num_nodes=2)


@pytest.mark.parametrize("options", [{"devices": 10**9}, {}])
def test_huge_numbers_are_checked_before_lists_of_that_length_are_made(options, tmp_path):
    with pytest.raises(UserError, match=r"1000000000.* at most 64"):
        ipu_trainer(tmp_path, strategy=ipu_strategy(replication_factor=10**9), **options)


def test_blocks_that_a_module_has_already_are_replaced_with_a_notice(tmp_path, caplog):
    module = LanguageModel()
    for index in (0, 4):
        poptorch.BeginBlock(module.layers[index], ipu_id=index // 4)
    with caplog.at_level(logging.INFO):
        ipu_trainer(tmp_path).fit(module, loader(DATA))
    notice = "Removed 2 BeginBlock annotations of LanguageModel: blocks are placed by layers_per"
    assert len([line for line in caplog.messages if notice in line]) == 1
    assert not any(part._forward_pre_hooks for part in module.modules())


class AdamW(torch.optim.AdamW):
    """Has the name of one that is supported."""


class OwnAdamW(LanguageModel):
    def configure_optimizers(self):
        return AdamW(self.parameters())


def test_an_optimizer_of_the_same_name_is_named_by_its_module(tmp_path):
    message = f"{AdamW.__module__}.AdamW is not supported on IPUs. Use torch.optim.AdamW, "
    with pytest.raises(UserError, match=message):
        ipu_trainer(tmp_path).fit(OwnAdamW(), loader(DATA))


class Tempered(LanguageModel):
    """Parameters of the loss, and a name outside of all blocks for a weight of a block."""

    def __init__(self):
        super().__init__()
        self.alias = self.embed
        self.temperature = nn.Parameter(torch.tensor(0.8))
        self.scale = nn.Linear(1, 1)
        for name in ("embed", *(f"layers.{i}" for i in range(6)), "head"):
            self._modules[name.split(".")[0]] = self._modules.pop(name.split(".")[0])

    def pipeline_loss(self, output, batch):
        ones = torch.ones(1, 1, device=self.device)
        return super().pipeline_loss(output * self.temperature * self.scale(ones).sum(), batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_parameters_of_the_loss_and_aliases_train_and_resume(tmp_path):
    torch.manual_seed(3)
    expected = Tempered()
    torch.manual_seed(3)
    module = Tempered()
    saved = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    plain_trainer(tmp_path, max_epochs=2).fit(expected, loader(DATA, replicas=1))
    ipu_trainer(tmp_path, saved).fit(module, loader(DATA))
    trainer = ipu_trainer(tmp_path, max_epochs=2)
    trainer.fit(Tempered(), loader(DATA), ckpt_path=tmp_path / "last.ckpt")
    assert float(expected.temperature.detach()) != pytest.approx(0.8, abs=1e-3)
    assert "alias.weight" in dict(module.named_parameters())
    check_weights(weights_of(trainer.lightning_module), weights_of(expected))


class Failing(LanguageModel):
    """Fails after an update, or is interrupted."""

    error = ValueError("wrong data")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 1:
            raise self.error


@pytest.mark.parametrize("error", [ValueError("wrong data"), KeyboardInterrupt()])
@pytest.mark.filterwarnings("ignore:Detected KeyboardInterrupt")
def test_a_failed_fit_gives_ipus_and_weights_back(error, tmp_path):
    class Stopped(LanguageModel):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.trainer.should_stop = batch_idx == 1

    torch.manual_seed(3)
    expected = Stopped()
    torch.manual_seed(3)
    module = Failing()
    module.error = error
    trainer = plain_trainer(tmp_path, limit_train_batches=2)
    trainer.fit(expected, loader(DATA, replicas=1))
    with suppress(ValueError, KeyboardInterrupt, SystemExit):  # Lightning 2.3 returns after Ctrl-C
        ipu_trainer(tmp_path).fit(module, loader(DATA))
    assert poptorch.device.POOL.held == 0
    check_weights(weights_of(module), weights_of(expected))
    assert all(type(p) is nn.Parameter for p in module.parameters())
    module.error = None
    module.on_train_batch_end = lambda *args: None
    ipu_trainer(tmp_path).fit(module, loader(DATA))  # again
