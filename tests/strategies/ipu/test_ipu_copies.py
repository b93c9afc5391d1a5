"""Weights travel between host and IPUs as rarely as they can, and are never out of date."""

import lightning.pytorch as pl
import poptorch
import pytest
import torch
from ipu_runs import (
    ipu_trainer,
    loader,
    plain_trainer,
    with_adamw,
)
from language_model import LanguageModel, Sentences
from lightning.pytorch.callbacks import ModelCheckpoint
from model_helpers import Losses
from models import GLOBAL_BATCH, make_model
from torch import nn

COUNTS = poptorch.device.COUNTS


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


def test_a_module_that_clears_gradients_itself_copies_no_weights(tmp_path):
    class Clears(LanguageModel):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=True)

    ipu_trainer(tmp_path).fit(Clears(), loader(Sentences(3 * GLOBAL_BATCH)))
    assert COUNTS["to_host"] == 2  # at the end: weights, and the optimizer's state


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


def test_the_module_is_as_it_was_but_trained(tmp_path):
    module, examples = with_adamw("bert")
    before = {name: id(p) for name, p in module.named_parameters()}
    ipu_trainer(tmp_path).fit(module, loader(examples), loader(examples))
    assert {name: id(p) for name, p in module.named_parameters()} == before
    assert {type(p) for p in module.parameters()} == {nn.Parameter}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
    assert module.device == torch.device("cpu")
    assert module.pipeline_executor is None


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
