"""Atomic writes of files and folders; reading without garbage collection."""

from __future__ import annotations

import gc
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

from filelock import FileLock


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` when the block ends without an error.

    A process that is killed at any point leaves the previous content of `path` intact.

    Args:
        path: Final path of the file; its folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # a power failure must not leave an empty file
        os.replace(partial, path)
    finally:
        if partial.exists():
            partial.unlink()


def built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return a folder, built by the first process that requests it; other processes wait.

    Args:
        folder: Final path of the folder.
        build: Writes the content into the folder passed to it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
            build(partial)
            os.replace(partial, folder)
    return folder


@contextmanager
def collections_paused() -> Iterator[None]:
    """Pause garbage collection within the context.

    Parsed files are many objects without cycles; looking for cycles among them takes twice as long
    as parsing them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
