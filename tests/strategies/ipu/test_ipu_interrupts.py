"""Ctrl-C on IPUs, and in one process without: what is saved, and what works afterwards."""

import copy
import os
import signal
import time
from contextlib import suppress

import lightning.pytorch as pl
import poptorch
import pytest
import torch
from ipu_runs import ipu_trainer, plain_trainer, weights_of, with_adamw
from model_helpers import Losses
from models import GLOBAL_BATCH

from lightning_ipu_bert.data.loaders import ResumableDataLoader, TrainingSampler

# Lightning 2.3 says so by a warning.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Detected KeyboardInterrupt")]
UPDATES, SENT, DONE = 4, 1, 2


class Press(pl.Callback):
    """Ctrl-C once or several times while an update is made."""

    def __init__(self, times=1):
        self.times = times

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == SENT:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.3 if self.times > 1 else 0.05)


def whole(folder):
    return pl.callbacks.ModelCheckpoint(folder, save_last=True)


def batches(examples, make):
    """Batches of an update, in an order that a resumed run continues."""
    size = GLOBAL_BATCH // (2 if make is ipu_trainer else 1)
    sampler = TrainingSampler([12] * len(examples), size)
    return ResumableDataLoader(examples, size, sampler=sampler)


def fit(trainer, *args, **kwargs):
    """Lightning 2.3 returns after Ctrl-C, newer ones end the process."""
    with suppress(SystemExit, KeyboardInterrupt):
        trainer.fit(*args, **kwargs)


@pytest.fixture(autouse=True)
def handler_and_ipus_are_given_back():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
    assert poptorch.device.POOL.held == 0


@pytest.mark.parametrize("make", [ipu_trainer, plain_trainer])
def test_the_first_saves_and_everything_works_afterwards(make, tmp_path, caplog):
    module, examples = with_adamw("bert", UPDATES)
    expected = Losses()
    truth = copy.deepcopy(module)
    make(tmp_path, expected).fit(truth, batches(examples, make))

    ended = Losses()
    fit(make(tmp_path, Press(), ended, whole(tmp_path)), module, batches(examples, make))
    path = tmp_path / "last.ckpt"
    assert f"Ended by Ctrl-C. To resume: --ckpt_path {path}" in caplog.messages
    assert torch.load(path, weights_only=True)["global_step"] == DONE
    assert ended.losses == expected.losses[:DONE]

    resumed = Losses()
    again = copy.deepcopy(module)
    make(tmp_path, resumed).fit(again, batches(examples, make), ckpt_path=path)
    torch.testing.assert_close(resumed.losses, expected.losses[DONE:], rtol=1e-5, atol=1e-6)
    for name, weight in weights_of(again).items():
        torch.testing.assert_close(weight, weights_of(truth)[name], rtol=1e-4, atol=1e-6)

    kept = weights_of(module)
    torch.save(module.state_dict(), tmp_path / "kept.pt")
    assert kept.keys() == weights_of(copy.deepcopy(module)).keys()
    make(tmp_path).validate(module, batches(examples, make), verbose=False)
    assert all(torch.equal(weight, kept[name]) for name, weight in weights_of(module).items())
    make(tmp_path).fit(module, batches(examples, make))
    assert any(not torch.equal(weight, kept[name]) for name, weight in weights_of(module).items())


@pytest.mark.parametrize("make", [ipu_trainer, plain_trainer])
def test_the_same_trainer_goes_on(make, tmp_path):
    module, examples = with_adamw("bert", UPDATES)
    trainer = make(tmp_path, Press(), whole(tmp_path))
    fit(trainer, module, batches(examples, make))
    trainer.validate(module, batches(examples, make), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, batches(examples, make), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 2 * UPDATES


@pytest.mark.parametrize("make", [ipu_trainer, plain_trainer])
def test_a_second_ends_at_once_and_saves_nothing(make, tmp_path, caplog, capfd):
    module, examples = with_adamw("bert", UPDATES)
    steps = Losses()
    fit(make(tmp_path, steps, Press(2), whole(tmp_path)), module, batches(examples, make))
    assert len(steps.losses) == SENT
    assert not (tmp_path / "last.ckpt").exists()
    assert not any("To resume" in line for line in caplog.messages)
    assert "Press it again to end immediately without saving" in capfd.readouterr().err

    make(tmp_path).fit(module, batches(examples, make))
    make(tmp_path).validate(module, batches(examples, make), verbose=False)
    assert len(examples) == UPDATES * GLOBAL_BATCH


@pytest.mark.parametrize("make", [ipu_trainer, plain_trainer])
def test_a_handler_of_ones_own_is_left_alone(make, tmp_path):
    came = []

    def handler(number, frame):
        came.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        module, examples = with_adamw("bert", UPDATES)
        steps = Losses()
        make(tmp_path, steps, Press(2), whole(tmp_path)).fit(module, batches(examples, make))
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == [signal.SIGINT] * 2
    assert len(steps.losses) == UPDATES


@pytest.mark.parametrize("make", [ipu_trainer, plain_trainer])
def test_in_a_validation_it_takes_effect_at_the_next_batch(make, tmp_path):
    class PressThere(pl.Callback):
        seen = 0

        def on_validation_batch_end(self, *args):
            self.seen += 1
            if self.seen == 1:
                os.kill(os.getpid(), signal.SIGINT)

    module, examples = with_adamw("bert", UPDATES)
    press = PressThere()
    with suppress(SystemExit, KeyboardInterrupt):
        make(tmp_path, press).validate(module, batches(examples, make), verbose=False)
    assert press.seen == 1 < len(batches(examples, make))
    assert not list(tmp_path.glob("*.ckpt"))
