"""Every test has 16 IPUs of its own, and counters at zero."""

import gc

import poptorch
import pytest


@pytest.fixture(autouse=True)
def ipus(monkeypatch):
    """The pool of IPUs."""
    if poptorch.device.POOL.held:
        gc.collect()  # programs that earlier tests have left
    poptorch.device.COUNTS.clear()
    poptorch.device.POOL.held = 0
    monkeypatch.setattr(poptorch.device.POOL, "size", 16)
    monkeypatch.setattr(poptorch.device.POOL, "version", 2)
    return poptorch.device.POOL
