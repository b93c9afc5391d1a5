"""Checkpoints of runs that are ended by SIGTERM or Ctrl-C."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_ipu_bert._compat.lightning import saves_on_exception


class InterruptedBetweenSteps(KeyboardInterrupt):
    """Ctrl-C, handled between two steps, where the run can be saved."""


class SaveOnTermination(Callback):
    """Saves to `last.ckpt` when SIGTERM or Ctrl-C ends a run, and prints how to resume.

    Lightning's ModelCheckpoint does so only with `save_on_exception` and `save_last`; the former
    does not exist in Lightning 2.3.
    """

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save to the folder of the ModelCheckpoint."""
        checkpointing = trainer.checkpoint_callback
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not (training and can_be_saved_after(exception)):
            return  # evaluation must not overwrite the checkpoint of a training run
        if isinstance(checkpointing, ModelCheckpoint) and checkpointing.dirpath:
            path = (
                Path(checkpointing.dirpath)
                / f"{checkpointing.CHECKPOINT_NAME_LAST}{checkpointing.FILE_EXTENSION}"
            )
            trainer.save_checkpoint(path)
            rank_zero_info(f"Ended by {cause_of(exception)}. To resume: --ckpt_path {path}")


def cause_of(exception: BaseException) -> str:
    """Return what has ended a run, given its exception."""
    return "SIGTERM" if isinstance(exception, SIGTERMException) else "Ctrl-C"


def saved_on_exception(trainer: Trainer) -> str:
    """Return the checkpoint that a ModelCheckpoint of the user has just saved, or nothing."""
    checkpointing = trainer.checkpoint_callback
    if isinstance(checkpointing, ModelCheckpoint) and saves_on_exception(checkpointing):
        return str(checkpointing.last_model_path)
    return ""


def can_be_saved_after(exception: BaseException) -> bool:
    """Return whether an exception ends a run at a point where it can be saved."""
    return isinstance(exception, (SIGTERMException, InterruptedBetweenSteps))
