"""What a checkpoint says about batches and updates, and whether a run can resume there."""

from __future__ import annotations

from typing import Any, Iterator, Mapping

from lightning_ipu_bert.checkpoint_file import IPU_KEY
from lightning_ipu_bert.pipeline.rules import Violation


def progress_rules(checkpoint: Mapping[str, Any], updates_per_batch: int) -> Iterator[Violation]:
    """A run that resumes counts batches and updates as before.

    In the middle of an epoch a batch must be as many updates as it was, and the updates so far must
    be a whole number of batches, or no interval would ever be hit.

    Args:
        checkpoint: Lightning's, of any strategy.
        updates_per_batch: Updates of a batch from now on: `device_iterations` on IPUs, else 1.
    """
    updates = checkpoint.get("global_step", 0)
    if updates % updates_per_batch:
        yield Violation(
            "device_iterations",
            updates_per_batch,
            f"must divide the {updates} updates that the checkpoint has made, or no interval is "
            "hit",
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
            "cannot count on: the checkpoint was saved in the middle of an epoch with "
            f"device_iterations={saved}",
            f"Resume with device_iterations={saved}, or from a checkpoint of the end of an epoch.",
        )
