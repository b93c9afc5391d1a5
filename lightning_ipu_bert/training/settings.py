"""Settings of the optimizer. No torch: a plan does not require it."""

from __future__ import annotations

from typing import Iterator

from lightning_ipu_bert.pipeline.rules import Violation, choice_rule

LR_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
}
"""Schedule name: name in transformers."""


def learning_rate_rules(
    learning_rate: float, lr_schedule: str, warmup_ratio: float, warmup_steps: int
) -> Iterator[Violation]:
    """Hyperparameters must be within their ranges."""
    if not 0 < learning_rate < float("inf"):
        yield Violation("learning_rate", learning_rate, "must be above 0 and finite", "E.g. 5e-5.")
    yield from choice_rule("lr_schedule", lr_schedule, LR_SCHEDULES)
    if not 0 <= warmup_ratio < 1:
        rule = "must be at least 0 and below 1"
        yield Violation("warmup_ratio", warmup_ratio, rule, "E.g. 0.1.")
    if warmup_steps < 0:
        yield Violation("warmup_steps", warmup_steps, "must be 0 or more", "0 turns it off.")
