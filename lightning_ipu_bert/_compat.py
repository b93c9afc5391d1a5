"""What differs between the two supported stacks, each with the version where it ends.

The SDK stack is what PopTorch 3.4 allows: torch 2.0.1, Lightning 2.3.3, transformers 4.46.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any, Dict

from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


def has_pipelining() -> bool:
    """Say whether this torch runs pipelines; torch 2.0 has none, and those of 2.4 lack options."""
    if importlib.util.find_spec("torch.distributed.pipelining") is None:
        return False
    from torch.distributed.pipelining import ScheduleGPipe

    return "return_outputs" in inspect.signature(ScheduleGPipe.step).parameters


def layer_output(output: Any) -> Any:
    """Return the hidden states that a layer of BERT gives, in a tuple before transformers 5."""
    return output[0] if isinstance(output, tuple) else output


def count_saved_batch(checkpoint: Dict[str, Any]) -> None:
    """Count the batch at whose end a checkpoint was saved; ends with Lightning 2.5.

    Lightning counts a batch as completed after the hooks in which callbacks save. Newer ones make
    up for that when a run is resumed; older ones would train on one batch too many.

    Args:
        checkpoint: What `on_load_checkpoint` is given; changed in place.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    if hasattr(_TrainingEpochLoop, "update_restart_stage") or not loops:
        return
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    if batches["current"]["completed"] != batches["current"]["processed"] - 1:
        return
    for span in ("total", "current"):
        batches[span]["completed"] += 1
        if batches["is_last_batch"]:  # the epoch is done, less its validation, as in newer ones
            epochs[span]["processed"] += 1
            epochs[span]["completed"] += 1
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    logged = loops["epoch_loop.state_dict"]
    logged["_batches_that_stepped"] = max(
        logged["_batches_that_stepped"], steps["total"]["completed"]
    )
