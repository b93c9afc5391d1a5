"""Checkpoint files: the keys of what this package keeps in them, and how they are read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Dict

from lightning_ipu_bert.errors import UserError

TOKENIZER_KEY = "tokenizer_files"
"""The files of the tokenizer: {name: text}."""
SCORES_KEY = "scores"
"""The scores measured with just these weights."""
ORIGIN_KEY = "trained_from"
"""Name of the model that training began with."""
IPU_KEY = "ipu"
"""The IPU config, the number of IPUs, and the state of their random numbers."""


def read_checkpoint(path: str) -> Dict[str, Any]:
    """Return the content of a checkpoint, on the CPU.

    Raises:
        UserError: If there is none, or it is not a checkpoint of plain values.
    """
    import torch  # here: the keys above are also for code that must not need torch

    if not Path(path).is_file():
        raise UserError(f"There is no checkpoint '{path}'. Check the path.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"'{path}' is not a checkpoint of this package: {str(error).splitlines()[0]} "
            "Give a .ckpt that fit has written."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(
            f"'{path}' is not a Lightning checkpoint. Give a .ckpt that fit has written."
        )
    return checkpoint
