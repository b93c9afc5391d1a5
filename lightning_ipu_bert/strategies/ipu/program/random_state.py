"""The random state of the IPUs, in checkpoints and programs."""

from __future__ import annotations

from typing import Any, List, Mapping, Optional

from lightning.pytorch.utilities.rank_zero import rank_zero_info


class RandomState:
    """The random state of a checkpoint until it is restored, then that of the program."""

    def __init__(self, loaded: Mapping[str, Any]) -> None:
        """Create the state from the IPU entry of a checkpoint.

        Args:
            loaded: ``rng_state`` and ``num_ipus``; empty for a new run.
        """
        self._loaded: Optional[List[int]] = loaded.get("rng_state")
        self._num_ipus: Optional[int] = loaded.get("num_ipus")

    def of(self, poplar: Optional[Any]) -> Optional[List[int]]:
        """Return the state of a program, or the loaded state if there is no program."""
        if poplar is None:
            return self._loaded
        state: Optional[List[int]] = poplar.rng_state
        return state

    def restore(self, poplar: Any, num_ipus: int) -> None:
        """Restore the loaded state in the program that was just compiled, once."""
        state, self._loaded = self._loaded, None
        if state is None:
            return
        if self._num_ipus != num_ipus:
            rank_zero_info(
                "The random state of the checkpoint is for another number of IPUs; only its "
                "seed is used. Dropout masks differ from those of an uninterrupted run."
            )
            state = state[:1]
        poplar.rng_state = state
