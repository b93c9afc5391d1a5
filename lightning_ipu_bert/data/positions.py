"""Which part of the data a Trainer has read or will read."""

from __future__ import annotations

from typing import Any, Dict, Optional

from lightning.pytorch import Trainer

from lightning_ipu_bert.data.loaders import ResumableDataLoader


def training_position(trainer: Trainer) -> Optional[Dict[str, int]]:
    """Return the state of the training loader of a Trainer, or None without a resumable one."""
    if not isinstance(trainer.train_dataloader, ResumableDataLoader):
        return None
    state = trainer.train_dataloader.state_dict()
    # A batch that is not trained on yet, e.g. at a signal of SLURM, must not be counted.
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    state["batches"] -= progress.ready - progress.processed
    return state


def limits_evaluation(trainer: Optional[Trainer]) -> bool:
    """Return whether a Trainer evaluates on a part of the batches only."""
    if trainer is None:
        return False
    limits = (trainer.limit_val_batches, trainer.limit_test_batches, trainer.limit_predict_batches)
    return any(isinstance(limit, int) or limit < 1.0 for limit in limits)
