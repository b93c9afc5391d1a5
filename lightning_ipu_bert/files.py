"""Files and folders that are whole or not there, and how checkpoints are read."""

from __future__ import annotations

import os
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

import torch
from filelock import FileLock

from lightning_ipu_bert.errors import UserError


def read_checkpoint(path: str) -> Dict[str, Any]:
    """Return the content of a checkpoint, on the CPU.

    Raises:
        UserError: If there is none, or it is no checkpoint of plain values.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no checkpoint '{path}'. Check the path.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"'{path}' is no checkpoint of this package: {str(error).splitlines()[0]} "
            "Give a .ckpt that fit has written."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(
            f"'{path}' holds no Lightning checkpoint. Give a .ckpt that fit has written."
        )
    return checkpoint


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Give a name to write to; rename what was written to `path` once the block ends well.

    A kill at any moment leaves what stood under `path` as it was.

    Args:
        path: The final name of a file; its folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # or a power failure might leave the new name without content
        os.replace(partial, path)
    finally:
        if partial.exists():
            partial.unlink()


def built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return a folder that the first process that asks for it builds; others wait meanwhile.

    Args:
        folder: The final name.
        build: Writes the content into the folder that it is given.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
            build(partial)
            os.replace(partial, folder)
    return folder
