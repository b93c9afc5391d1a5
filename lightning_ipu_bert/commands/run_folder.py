"""Defaults of the command line in the folder of a run: where it logs and saves checkpoints."""

from __future__ import annotations

from jsonargparse import Namespace

LOGGER = "lightning.pytorch.loggers.CSVLogger"
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"


def set_run_folder(trainer: Namespace) -> None:
    """Set logger and checkpoints that a config does not set, if `default_root_dir` is set.

    A CSVLogger, the best checkpoint by val/f1 as `best.ckpt`, and `last.ckpt`. A ModelCheckpoint of a
    config without `dirpath` saves to the folder, too.

    Args:
        trainer: The parsed options of the Trainer; modified in place.
    """
    folder = trainer.default_root_dir
    if folder is None:
        return
    if trainer.logger is None:
        trainer.logger = Namespace(class_path=LOGGER, init_args=Namespace(save_dir=str(folder)))
    if trainer.callbacks is None:
        options = Namespace(
            filename="best",
            monitor="val/f1",
            mode="max",
            save_last=True,
            enable_version_counter=False,
        )
        trainer.callbacks = [Namespace(class_path=CHECKPOINT, init_args=options)]
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    for callback in callbacks:
        if callback.class_path == CHECKPOINT and callback.init_args.get("dirpath") is None:
            callback.init_args.dirpath = str(folder)
