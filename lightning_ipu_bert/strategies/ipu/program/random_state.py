"""The state of the IPUs' random numbers, in a checkpoint and in a program."""

from __future__ import annotations

from typing import Any, List, Mapping, Optional

from lightning.pytorch.utilities.rank_zero import rank_zero_info


class RandomState:
    """Of a checkpoint, until there is a program to take it; then the program's own."""

    def __init__(self, loaded: Mapping[str, Any]) -> None:
        """Keep what a checkpoint says.

        Args:
            loaded: ``rng_state`` and ``num_ipus``; empty for a fresh run.
        """
        self._loaded: Optional[List[int]] = loaded.get("rng_state")
        self._num_ipus: Optional[int] = loaded.get("num_ipus")

    def of(self, poplar: Optional[Any]) -> Optional[List[int]]:
        """Return the state of a program, or the loaded one while there is no program."""
        if poplar is None:
            return self._loaded
        state: Optional[List[int]] = poplar.rng_state
        return state

    def restore(self, poplar: Any, num_ipus: int) -> None:
        """Give the loaded state to the program that was just compiled, once."""
        state, self._loaded = self._loaded, None
        if state is None:
            return
        if self._num_ipus != num_ipus:
            rank_zero_info(
                "The random state of the checkpoint belongs to another number of IPUs; only its "
                "seed is taken over. Dropout masks differ from those of an uninterrupted run."
            )
            state = state[:1]
        poplar.rng_state = state
