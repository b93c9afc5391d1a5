"""Defaults of the command line in the folder of a run: logger and checkpoints."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"
LAST = {"save_last": True, "enable_version_counter": False}
BEST = {"filename": "best", "monitor": "val/f1", "mode": "max"}


def set_run_folder(trainer: Namespace, validates: bool) -> None:
    """Set the logger and checkpoints that a config does not set, if `default_root_dir` is set.

    The defaults are a CSVLogger, `last.ckpt`, and `best.ckpt` (by val/f1) if the run validates. A
    ModelCheckpoint in a config without `dirpath` also saves to the folder.

    Args:
        trainer: The parsed options of the Trainer; modified in place.
        validates: Whether there is validation data.
    """
    folder = trainer.default_root_dir
    if folder is None:
        return
    if trainer.logger is None:
        trainer.logger = _instance("lightning.pytorch.loggers.CSVLogger", save_dir=str(folder))
    if trainer.callbacks is None:
        kept = BEST if validates else {"save_top_k": 0}
        trainer.callbacks = [_instance(CHECKPOINT, **LAST, **kept)]
    callbacks = trainer.callbacks
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if callback.class_path == CHECKPOINT and callback.init_args.get("dirpath") is None:
            callback.init_args.dirpath = str(folder)


def _instance(class_path: str, **init_args: object) -> Namespace:
    make: Any = Namespace  # untyped in jsonargparse
    namespace: Namespace = make(class_path=class_path, init_args=make(**init_args))
    return namespace
