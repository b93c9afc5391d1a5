"""Random states of a process: the generators of torch, NumPy and Python, and their checkpoints."""

from __future__ import annotations

import hashlib
import random
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

# ruff: noqa: NPY002  # the global generator of numpy, from which transforms of users draw


class GeneratorStates(NamedTuple):
    """States of the generators on the CPU, from which steps and loaders draw; plain values."""

    torch: Tensor
    """[bytes], uint8."""
    numpy: Tensor
    """[624], int64: the key of the Mersenne Twister."""
    numpy_rest: Tuple[int, int, float]
    """Position in the key; whether there is a second normal number, and this number."""
    python: Tuple[object, ...]

    @classmethod
    def current(cls) -> GeneratorStates:
        """Return the states of this process."""
        state = np.random.get_state(legacy=False)
        return cls(
            torch.get_rng_state(),
            torch.from_numpy(state["state"]["key"].astype(np.int64)),
            (int(state["state"]["pos"]), int(state["has_gauss"]), float(state["gauss"])),
            random.getstate(),
        )

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> GeneratorStates:
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


def seed_generators(seed: int) -> None:
    """Seed all generators of this process, those of GPUs included."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class RandomStates(Callback):
    """Saves the states of the random generators in checkpoints and restores them.

    Lightning does not; without them a resumed run draws different dropout masks. For a single
    process; replicas of a pipeline have states of their own (`ReplicaGenerators`).
    """

    def __init__(self) -> None:
        """Create the callback."""
        self._loaded: Optional[Dict[str, Any]] = None

    @override
    def state_dict(self) -> Dict[str, Any]:
        """Return the states of the generators of this process."""
        cuda: List[torch.Tensor] = []
        if torch.cuda.is_available():
            cuda = [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())]
        return {**GeneratorStates.current()._asdict(), "cuda": cuda}

    @override
    def load_state_dict(self, state_dict: Dict[str, object]) -> None:
        """Store the states until the first batch."""
        self._loaded = state_dict

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Restore the states as late as possible: the setup of a run draws random numbers, too."""
        state, self._loaded = self._loaded, None
        # A checkpoint contains the states of one process; several must not draw the same masks.
        if state is None or trainer.world_size > 1:
            return
        GeneratorStates.of(state).restore()
        for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda.cpu(), device)
