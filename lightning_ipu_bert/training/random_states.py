"""Random states in checkpoints."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class RandomStates(Callback):
    """Saves the states of the random generators in checkpoints and restores them.

    Lightning does not; without them a resumed run draws different dropout masks.
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
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

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
        torch.set_rng_state(state["cpu"].cpu())
        for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda.cpu(), device)
