"""As in a notebook: ranks are forked from the current process."""

import warnings

import lightning.pytorch as pl
import torch
from language_model import LanguageModel, Sentences
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ipu_bert import PipelineParallelStrategy

EXAMPLES = Sentences(32)


def fit(module, strategy, devices):
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=devices,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    sampler = DistributedSampler(EXAMPLES, 1, 0, shuffle=False)
    trainer.fit(module, DataLoader(EXAMPLES, 8, sampler=sampler))


def make_run():
    torch.manual_seed(3)
    return LanguageModel()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    piped, plain = make_run(), make_run()
    for _ in range(2):
        strategy = PipelineParallelStrategy(
            layers_per_stage=[3, 3], gradient_accumulation_steps=4, start_method="fork"
        )
        fit(piped, strategy, 2)
    for _ in range(2):
        fit(plain, "auto", 1)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(piped.state_dict()[name], weight, rtol=1e-5, atol=1e-7)
    print("the same weights")
