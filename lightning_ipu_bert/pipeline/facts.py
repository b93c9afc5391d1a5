"""The properties of a strategy that models and data depend on. They read nothing else of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StrategyFacts:
    """Facts about a strategy; the defaults hold for strategies of other packages."""

    micro_batches_per_batch: int = 1
    """Micro-batches in a batch of a loader: above 1 if the strategy accumulates gradients."""
    updates_per_batch: int = 1
    """Weight updates per training batch: `device_iterations` on IPUs."""
    static_shapes: bool = False
    """Whether all batches must have the same shape: loaders then pad to a fixed length."""
    compile_seconds: float = 0.0
    """Compilation time of this run so far."""
    splits_backward: bool = False
    """Whether gradients of inputs and of parameters are computed one after the other, as in
    zero-bubble schedules: functions with their own backward cannot be split."""
    holds_interrupts: bool = False
    """Whether the strategy itself defers Ctrl-C to the end of a step."""
    data_group: Any = None
    """Process group among whose ranks examples are divided: one rank of each replica; None for all
    processes."""


def facts_of(trainer: Any) -> StrategyFacts:
    """Return the facts about the strategy of a Trainer.

    Args:
        trainer: The Trainer, or None for a data module without one.
    """
    # The only place that reads an attribute which other strategies do not have.
    facts = None if trainer is None else getattr(trainer.strategy, "facts", None)
    return facts if isinstance(facts, StrategyFacts) else StrategyFacts()
