"""Compiling for the next run, where there need be no IPUs."""

from __future__ import annotations

from typing import Any

from lightning_ipu_bert.strategies.ipu.executor import IPUExecutor


def compile_and_end(trainer: Any, executor: IPUExecutor) -> None:
    """Compile both programs of a `fit`, and end it.

    Args:
        trainer: Is about to train, and has its training loader.
        executor: Compiles.

    Raises:
        SystemExit: Always, with code 0.
    """
    executor.compile_training(next(iter(trainer.train_dataloader)))
    trainer.lightning_module.eval()
    if trainer.enable_validation:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loaders = trainer.val_dataloaders
    for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
        if loader is not None and executor.inference is None:
            executor.compile_inference(next(iter(loader)))
    executor.end_offline()
