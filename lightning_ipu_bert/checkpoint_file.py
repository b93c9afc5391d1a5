"""Checkpoint files: the keys of the entries that this package adds, and how to read them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Dict

from lightning_ipu_bert.errors import UserError

MODEL_SETTINGS_KEY = "hyper_parameters"
"""Arguments of the module, saved by Lightning."""
DATA_SETTINGS_KEY = "datamodule_hyper_parameters"
"""Arguments of the data module, saved by Lightning."""
TOKENIZER_KEY = "tokenizer_files"
"""Tokenizer files: {name: text}."""
SCORES_KEY = "scores"
"""Scores evaluated with exactly these weights."""
ORIGIN_KEY = "trained_from"
"""Name of the pretrained model that training started from."""
PRECISION_KEY = "precision"
"""The precision of the Trainer that wrote it."""
GENERATORS_KEY = "replica_generators"
"""Random states of a pipeline on ranks, one entry per replica."""
IPU_KEY = "ipu"
"""IPU config, number of IPUs, and the random state of the IPUs."""


def read_checkpoint(path: str) -> Dict[str, Any]:
    """Load a checkpoint onto the CPU.

    Raises:
        UserError: If the file does not exist or is not a checkpoint of plain values.
    """
    import torch  # lazily: the keys above are also used by code that does not require torch

    if not Path(path).is_file():
        raise UserError(f"Checkpoint '{path}' does not exist. Check the path.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"'{path}' is not a checkpoint of this package: {str(error).splitlines()[0]} "
            "Pass a .ckpt file written by fit."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(
            f"'{path}' is not a Lightning checkpoint. Give a .ckpt that fit has written."
        )
    return checkpoint
