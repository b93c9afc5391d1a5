"""The IPUs of this machine: how many there are, who has them, and what travels to them."""

import os
from collections import Counter


class Error(RuntimeError):
    """What PopTorch raises."""


class _Pool:
    """IPUs, of which attached programs hold some."""

    def __init__(self, size=16):
        self.size = size
        self.held = 0
        self.version = 2

    def take(self, count):
        if self.held + count > self.size:
            none = "\nNo device found on the system" if count > self.size else ""
            raise Error(f"Failed to acquire {count} IPU(s){none}")
        self.held += count

    def give(self, count):
        self.held -= count


POOL = _Pool()
COUNTS = Counter()
"""Copies of all weights or the whole state (to_host, to_device); set_optimizer, compilations."""


def ipuHardwareIsAvailable(num_ipus: int = 1) -> bool:
    """Whether there is a device of exactly so many at all, in use or not; a simulation is none."""
    if os.environ.get("POPTORCH_IPU_MODEL", "0") != "0":
        return False
    return num_ipus <= POOL.size and not num_ipus & (num_ipus - 1)


def ipuHardwareVersion() -> int:
    assert ipuHardwareIsAvailable(), "No IPU hardware available on this system"
    return POOL.version
