"""Memory that is freed on CPUs stays with the process, so that steps cause no page faults.

By default glibc returns large blocks to the system when they are freed. A training step allocates
the same blocks again, and the system clears every page of them, in every step.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of mallopt. Source: man 3 mallopt."""
LARGEST = 2**31 - 1
TOP_PAD = 64 * 2**20
"""Bytes by which the heap grows at a time."""
OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc", "hoard", "snmalloc")


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for later allocations; it holds for the rest of the process.

    Returns:
        Whether it was set: not without glibc, with another allocator, or where the environment
        already tunes it (``MALLOC_...``, ``GLIBC_TUNABLES``).
    """
    if platform.libc_ver()[0] != "glibc" or is_tuned() or has_other_allocator():
        return False
    mallopt: Any = ctypes.CDLL(None).mallopt
    values = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: LARGEST, M_TOP_PAD: TOP_PAD}
    return 0 not in [mallopt(parameter, value) for parameter, value in values.items()]


def is_tuned() -> bool:
    """Return whether the environment sets parameters of the allocator."""
    return any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)


def has_other_allocator() -> bool:
    """Return whether an allocator other than glibc's is loaded."""
    maps = Path("/proc/self/maps")
    text = maps.read_text("utf8", "replace") if maps.exists() else ""
    return any(name in text for name in OTHER_ALLOCATORS)


class KeepFreedMemory(pl.Callback):
    """Callback that lets a process keep freed memory if it trains or evaluates on CPUs.

    See `keep_freed_memory`. The process keeps what it needed at its peak until it ends.
    """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set up the allocator of this process."""
        if trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
