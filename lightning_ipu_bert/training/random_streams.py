"""The random generators of a process: torch, numpy and python."""

from __future__ import annotations

import hashlib
import random
from typing import Any, Mapping, NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor

# ruff: noqa: NPY002  # the global generator of numpy, from which transforms of users draw


class RandomStreams(NamedTuple):
    """States of the generators on the CPU, from which steps and loaders draw; plain values."""

    torch: Tensor
    """[bytes], uint8."""
    numpy: Tensor
    """[624], int64: the key of the Mersenne Twister."""
    numpy_rest: Tuple[int, int, float]
    """Position in the key; whether there is a second normal number, and this number."""
    python: Tuple[object, ...]

    @classmethod
    def current(cls) -> RandomStreams:
        """Return the states of this process."""
        state = np.random.get_state(legacy=False)
        return cls(
            torch.get_rng_state(),
            torch.from_numpy(state["state"]["key"].astype(np.int64)),
            (int(state["state"]["pos"]), int(state["has_gauss"]), float(state["gauss"])),
            random.getstate(),
        )

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> RandomStreams:
        """Return the states from their `_asdict` in a checkpoint."""
        return cls(**{name: state[name] for name in cls._fields})

    def restore(self) -> None:
        """Set the generators of this process to these states."""
        torch.set_rng_state(self.torch.cpu())
        key = self.numpy.cpu().numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, *self.numpy_rest))
        random.setstate(self.python)

    def seed(self, purpose: str) -> int:
        """Return a seed of 63 bits, which is equal in all processes with these states.

        Args:
            purpose: Makes several seeds of the same states different.
        """
        content = (self.numpy_rest, self.python, purpose)
        digest = hashlib.sha256(self.torch.numpy().tobytes() + self.numpy.numpy().tobytes())
        digest.update(repr(content).encode())
        return int.from_bytes(digest.digest()[:8], "big") >> 1


def seed_streams(seed: int) -> None:
    """Seed all generators of this process, those of GPUs included."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
