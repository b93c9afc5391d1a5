"""Runs that are ended by SIGTERM or Ctrl-C: what is saved, and how to resume."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override


class InterruptedBetweenSteps(KeyboardInterrupt):
    """Ctrl-C, at a place where the run can be saved."""


class SaveOnTermination(Callback):
    """Saves to `last.ckpt` when SIGTERM or Ctrl-C ends a run, and says how to resume it.

    Lightning's own ModelCheckpoint does so only if told to by `save_on_exception` and `save_last`,
    the first of which the SDK's Lightning does not have.
    """

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save beside the run's other checkpoints."""
        keeper = trainer.checkpoint_callback
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not (training and ends_in_order(exception)):
            return  # evaluation has nothing to save, and must not overwrite what training saved
        if isinstance(keeper, ModelCheckpoint) and keeper.dirpath:
            path = Path(keeper.dirpath) / f"{keeper.CHECKPOINT_NAME_LAST}{keeper.FILE_EXTENSION}"
            trainer.save_checkpoint(path)
            cause = "SIGTERM" if isinstance(exception, SIGTERMException) else "Ctrl-C"
            rank_zero_info(f"Ended by {cause}. To resume: --ckpt_path {path}")


def ends_in_order(exception: BaseException) -> bool:
    """Return whether an exception ends a run at a place where it can be saved."""
    return isinstance(exception, (SIGTERMException, InterruptedBetweenSteps))
