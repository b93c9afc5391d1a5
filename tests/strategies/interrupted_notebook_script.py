"""Ctrl-C in a notebook whose ranks are forked: python interrupted_notebook_script.py HOW.

HOW is once (the notebook alone hears of it), terminal (all processes do) or twice.
"""

import copy
import os
import signal
import sys
import time

import lightning.pytorch as pl
import pytest
import torch
from language_model import LanguageModel
from notebook_script import EXAMPLES, make_run
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ipu_bert import PipelineParallelStrategy

SENT, DONE = 1, 2
"""Updates that are made when the signal comes, and when the run ends by it."""


class Interrupt(pl.Callback):
    def __init__(self, notebook):
        self.notebook = notebook

    def send(self):
        if sys.argv[1] == "terminal":  # to a notebook that is slow to forward it
            os.kill(self.notebook, signal.SIGSTOP)
            os.killpg(os.getpgid(self.notebook), signal.SIGINT)
            time.sleep(0.5)
            os.kill(self.notebook, signal.SIGCONT)
        else:
            os.kill(self.notebook, signal.SIGINT)
        time.sleep(0.5)

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_rank == 1 and trainer.global_step == SENT:
            self.send()
            if sys.argv[1] == "twice":
                self.send()


def trainer(*callbacks, devices=2, strategy=None):
    forked = PipelineParallelStrategy(
        layers_per_stage=[3, 3], gradient_accumulation_steps=4, start_method="fork"
    )
    return pl.Trainer(
        accelerator="cpu",
        strategy=strategy or forked,
        devices=devices,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


def loader(count=32):
    part = torch.utils.data.Subset(EXAMPLES, range(count))
    return DataLoader(part, 8, sampler=DistributedSampler(part, 1, 0, shuffle=False))


def equal(module, truth):
    for name, weight in truth.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], weight, rtol=1e-5, atol=1e-7)


if __name__ == "__main__":
    module, expected = make_run(), make_run()
    handler = signal.getsignal(signal.SIGINT)
    fit = trainer(Interrupt(os.getpid()))
    if sys.argv[1] == "twice":
        with pytest.raises(RuntimeError, match="Ended immediately by Ctrl-C; nothing was saved"):
            fit.fit(module, loader())
    else:
        fit.fit(module, loader())
        assert fit.interrupted
        trainer(devices=1, strategy="auto").fit(expected, loader(8 * DONE))
    equal(module, expected)
    assert signal.getsignal(signal.SIGINT) is handler
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    equal(copy.deepcopy(module), expected)
    torch.save(module.state_dict(), "saved.pt")
    restored = LanguageModel()
    restored.load_state_dict(torch.load("saved.pt", weights_only=True))
    equal(restored, expected)

    trainer().fit(module, loader())
    trainer(devices=1, strategy="auto").fit(expected, loader())
    equal(module, expected)
    trainer().validate(module, loader(), verbose=False)
    print("all is well")
