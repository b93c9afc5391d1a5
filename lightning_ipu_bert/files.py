"""Atomic writes of files and folders."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

from filelock import FileLock


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
