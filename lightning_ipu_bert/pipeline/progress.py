"""Batch and update counters of a checkpoint, and whether a run can resume from them."""

from __future__ import annotations

from typing import Any, Iterator, Mapping

from lightning_ipu_bert.checkpoint_file import IPU_KEY
from lightning_ipu_bert.pipeline.rules import Violation


def progress_rules(checkpoint: Mapping[str, Any], updates_per_batch: int) -> Iterator[Violation]:
    """A resumed run must count batches and updates as the saved run did.

    In the middle of an epoch the updates per batch must not change, and the updates so far must be
    divisible by the updates per batch, or no interval would ever be reached.

    Args:
        checkpoint: A Lightning checkpoint of any strategy.
        updates_per_batch: Updates per batch of the resumed run, `device_iterations` on IPUs.
    """
    updates = checkpoint.get("global_step", 0)
    if updates % updates_per_batch:
        yield Violation(
            "device_iterations",
            updates_per_batch,
            f"must divide the {updates} updates of the checkpoint, or no interval is reached",
            "Use a divisor, e.g. 1.",
        )
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    batches = loops.get("epoch_loop.batch_progress", {})
    middle = batches.get("current", {}).get("ready", 0) and not batches.get("is_last_batch")
    saved = checkpoint.get(IPU_KEY, {}).get("config", {}).get("device_iterations", 1)
    if middle and saved != updates_per_batch:
        yield Violation(
            "device_iterations",
            updates_per_batch,
            "cannot resume a checkpoint that was saved in the middle of an epoch with "
            f"device_iterations={saved}",
            f"Resume with device_iterations={saved}, or from a checkpoint saved at an epoch end.",
        )
