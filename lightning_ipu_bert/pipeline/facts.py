"""What model and data need to know of a strategy. Nothing else of it is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StrategyFacts:
    """Facts of a strategy; the defaults are those of strategies that are not ours."""

    micro_batches_per_batch: int = 1
    """Micro-batches in a batch of a loader: above 1 where the strategy accumulates by itself."""
    updates_per_batch: int = 1
    """Weight updates of one training batch: `device_iterations` on IPUs."""
    static_shapes: bool = False
    """Whether batches must have one shape: loaders then pad all examples to one length."""
    compile_seconds: float = 0.0
    """Time that this run has spent compiling."""
    holds_interrupts: bool = False
    """Whether the strategy itself lets Ctrl-C take effect between two steps."""


def facts_of(trainer: Any) -> StrategyFacts:
    """Return the facts of a Trainer's strategy.

    Args:
        trainer: A Trainer, or None for a data module without one.
    """
    # The only place where a strategy is asked for something that others do not have.
    facts = None if trainer is None else getattr(trainer.strategy, "facts", None)
    return facts if isinstance(facts, StrategyFacts) else StrategyFacts()
