"""Settings of a checkpoint, which override those of the command line."""

from __future__ import annotations

import re
from typing import Any, Dict

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ipu_bert.checkpoint_file import (
    DATA_SETTINGS_KEY,
    MODEL_SETTINGS_KEY,
    ORIGIN_KEY,
    PRECISION_KEY,
    read_checkpoint,
)

LIGHTNINGS_OWN = re.compile(r"(last|best|hpc)$|registry|.*://")
"""Values of --ckpt_path that Lightning resolves itself."""

WINDOWING = ("max_length", "doc_stride")


def follow_precision(trainer: Any, checkpoint: Dict[str, Any]) -> None:
    """Evaluate in the precision of the training, unless another one is given.

    Args:
        trainer: The parsed options of the Trainer; modified in place.
        checkpoint: The checkpoint. IPUs have precisions of their own, and float16 needs a GPU.
    """
    precision = checkpoint.get(PRECISION_KEY)
    on_ipus = trainer.accelerator == "ipu" or "IPUStrategy" in str(trainer.strategy)
    usable = precision and (not precision.startswith("16") or torch.cuda.is_available())
    if usable and not on_ipus and trainer.precision is None:
        trainer.precision = precision
        rank_zero_info(f"Using precision={precision} of the checkpoint.")


def follow_checkpoint(options: Any, defaults: Any, path: str, verb: str) -> None:
    """Override model settings, windows and tokenizer by those of a checkpoint.

    Weights, optimizer state and schedule of a checkpoint require its own settings, which therefore
    take precedence over the command line, as in Lightning. Differences are printed.

    Args:
        options: The parsed options of a verb; modified in place.
        defaults: Their defaults; options with their default value are not reported.
        path: The checkpoint.
        verb: The verb; all but fit run in the precision of the checkpoint, too.
    """
    checkpoint = read_checkpoint(path)
    if verb != "fit":
        follow_precision(options.trainer, checkpoint)
    saved = checkpoint.get(MODEL_SETTINGS_KEY, {})
    data = checkpoint.get(DATA_SETTINGS_KEY, {})
    known = {**saved, "model_name_or_path": checkpoint.get(ORIGIN_KEY)}
    different = []
    for group, values, names in (("model", known, list(known)), ("data", data, WINDOWING)):
        for name in names:
            given = options[group].get(name)
            if name not in values or name not in options[group]:
                continue
            if given != defaults[group].get(name) and not _agrees(given, values[name]):
                different.append(f"{name}={values[name]!r} (given: {given!r})")
            options[group][name] = saved.get(name) if group == "model" else values[name]
    if options.data.tokenizer_name_or_path is None:
        options.data.tokenizer_name_or_path = path
    if different:
        rank_zero_info(
            f"Using settings of the checkpoint: {', '.join(different)}. To train its weights with "
            "other settings, export it and pass the folder as --model.model_name_or_path."
        )


def _agrees(given: object, saved: object) -> bool:
    if isinstance(given, dict) and isinstance(saved, dict):
        return all(saved.get(name) == value for name, value in given.items())
    return bool(given == saved)
