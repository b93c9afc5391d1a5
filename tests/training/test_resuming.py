"""Checkpoints: complete, plain, and exact to resume from."""

import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from model_helpers import Losses, make_trainer

from lightning_ipu_bert import BertForQuestionAnsweringModule
from lightning_ipu_bert.commands.ask import answer_questions
from lightning_ipu_bert.commands.export import export
from lightning_ipu_bert.commands.loading import load_trained
from lightning_ipu_bert.training.checkpoint_io import AtomicCheckpointIO
from lightning_ipu_bert.training.random_states import RandomStates

pytestmark = pytest.mark.slow

STEPS_PER_EPOCH = 6


def run(make_module, make_data, folder, *callbacks, ckpt_path=None, **changes):
    """Train two short epochs with dropout; save after every update. Returns losses and trainer."""
    pl.seed_everything(5)
    history = Losses()
    checkpoints = pl.callbacks.ModelCheckpoint(
        folder, "{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False
    )
    trainer = make_trainer(
        folder,
        history,
        checkpoints,
        *callbacks,
        max_epochs=2,
        limit_train_batches=STEPS_PER_EPOCH,
        limit_val_batches=2,
        gradient_clip_val=1.0,
        **changes,
    )
    module = make_module(learning_rate=1e-2, warmup_ratio=0.2)
    data = make_data(group_by_length=True)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return history, trainer


@pytest.fixture
def whole(make_module, make_data, tmp_path):
    return run(make_module, make_data, tmp_path, num_sanity_val_steps=0)


@pytest.mark.parametrize("done", [2, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 3])
@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_a_resumed_run_repeats_the_losses_of_an_uninterrupted_one(
    make_module, make_data, tmp_path, whole, done, sanity_steps
):
    history, _ = whole
    torch.rand(3)  # another state of the random generators than at the start of the first run
    resumed, trainer = run(
        make_module,
        make_data,
        tmp_path,
        ckpt_path=str(tmp_path / f"step={done}.ckpt"),
        num_sanity_val_steps=sanity_steps,
    )
    assert resumed.losses == history.losses[done:]
    assert resumed.logged_rates == history.logged_rates[done:]
    assert trainer.global_step == 2 * STEPS_PER_EPOCH


class Terminate(pl.Callback):
    """Is told to end in the middle of the third update."""

    def on_before_backward(self, trainer, *_):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_the_step_at_hand_and_ends_the_run(make_module, make_data, tmp_path, whole):
    history, _ = whole
    with pytest.raises(SIGTERMException):
        run(make_module, make_data, tmp_path, Terminate())
    resumed, _ = run(make_module, make_data, tmp_path, ckpt_path=str(tmp_path / "last.ckpt"))
    assert resumed.losses == history.losses[3:]


class SaveBeforeBatch(pl.Callback):
    """As Lightning's handler of SLURM's signal may do: the batch is drawn, but not trained on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "before.ckpt")


def test_a_batch_that_is_drawn_but_not_trained_on_is_not_lost(
    make_module, make_data, tmp_path, whole
):
    history, _ = whole
    run(make_module, make_data, tmp_path, SaveBeforeBatch())
    resumed, _ = run(make_module, make_data, tmp_path, ckpt_path=str(tmp_path / "before.ckpt"))
    assert resumed.losses == history.losses[2:]


class TerminateValidation(pl.Callback):
    def on_validation_batch_start(self, *_):
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_in_a_validation_overwrites_no_checkpoint(make_module, make_data, tmp_path):
    (tmp_path / "last.ckpt").write_text("of a training")
    keeper = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
    trainer = make_trainer(tmp_path, keeper, TerminateValidation())
    with pytest.raises(SIGTERMException):
        trainer.validate(make_module(), make_data(), verbose=False)
    assert (tmp_path / "last.ckpt").read_text() == "of a training"


def test_dropout_masks_and_order_differ_without_what_the_checkpoint_holds(
    make_module, make_data, tmp_path, whole
):
    history, _ = whole
    path = tmp_path / "step=2.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"]["RandomStates"]
    torch.save(checkpoint, path)
    resumed, _ = run(make_module, make_data, tmp_path, ckpt_path=str(path))
    assert len(resumed.losses) == len(history.losses) - 2
    assert resumed.losses != history.losses[2:]


def test_a_checkpoint_is_complete_and_plain(make_module, make_data, tmp_path, quickstart):
    make_module().to_huggingface().save_pretrained(tmp_path / "weights")
    module = BertForQuestionAnsweringModule(str(tmp_path / "weights"))
    data = make_data()
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=2)
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    (tmp_path / "weights").rename(tmp_path / "gone")

    loaded = BertForQuestionAnsweringModule.load_from_checkpoint(
        tmp_path / "one.ckpt", map_location="cpu", weights_only=True
    )
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert all(name.startswith(("bert.", "qa_outputs.")) for name in loaded.state_dict())
    text = "Who was the founder of Nedyn Company?"
    assert loaded.tokenizer(text)["input_ids"] == data.tokenizer(text)["input_ids"]
    assert loaded.scores == module.scores
    assert set(loaded.scores) == {"val/exact_match", "val/f1"}

    trained = load_trained(str(tmp_path / "one.ckpt"))
    assert answer_questions(trained, [text], "Nedyn Company was founded by Rona Vosen.")
    assert (export(str(tmp_path / "one.ckpt"), str(tmp_path / "out")) / "config.json").exists()
    again = make_trainer(tmp_path, limit_val_batches=2)
    scores = again.validate(loaded, datamodule=make_data(), verbose=False)[0]
    assert scores["val/f1"] == pytest.approx(module.scores["val/f1"])


def test_scores_belong_to_the_weights_they_were_measured_with(make_module, make_data, tmp_path):
    module = make_module()
    trainer = make_trainer(tmp_path, max_steps=3, limit_val_batches=1, val_check_interval=2)
    trainer.fit(module, datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")  # after update 3; measured after update 2
    assert "scores" not in torch.load(tmp_path / "one.ckpt", weights_only=True)


def test_saving_is_atomic_in_every_run_unless_somebody_brings_an_io(
    make_module, make_data, tmp_path
):
    class OwnIO(pl.plugins.io.TorchCheckpointIO):
        pass

    kinds = []
    for plugins in ([], [OwnIO()]):
        trainer = make_trainer(tmp_path, fast_dev_run=1, plugins=plugins)
        trainer.fit(make_module(), datamodule=make_data())
        kinds.append(type(trainer.strategy.checkpoint_io))
    assert kinds == [AtomicCheckpointIO, OwnIO]


def test_all_generators_of_a_process_are_resumed():
    def draws():
        return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002

    trainer, states = SimpleNamespace(world_size=1), RandomStates()
    saved, expected = states.state_dict(), draws()
    assert draws() != expected
    states.load_state_dict(saved)
    states.on_train_batch_start(trainer, None, None, 0)
    assert draws() == expected
