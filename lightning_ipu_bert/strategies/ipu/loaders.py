"""Loaders for IPUs: batches of a whole call, as `poptorch.DataLoader` gives them."""

from __future__ import annotations

from typing import Any, Dict, Literal, Optional

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_ipu_bert._compat.lightning import note_indices, unwrapped_batch_sampler
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.batches import micro_batch_size_of
from lightning_ipu_bert.pipeline.ipu.program import ProgramConfig, enough_data_rule
from lightning_ipu_bert.pipeline.rules import enforce
from lightning_ipu_bert.strategies.ipu.loader_class import FlattenedBatchSampler, loader_like
from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch

LoaderMode = Literal["sync", "async", "async_rebatched"]
MODES = {"sync": "Sync", "async": "Async", "async_rebatched": "AsyncRebatched"}
"""Our names, and those of poptorch.DataLoaderMode."""


def ipu_loader(
    loader: Any, options: Any, program: ProgramConfig, accumulation: int, mode: LoaderMode = "sync"
) -> Any:
    """Return a loader whose batches are what one call of the IPUs takes.

    Args:
        loader: The user's. Its batch holds the micro-batches of a weight update of one replica; a
            batch sampler of the user's own gives micro-batches. A `poptorch.DataLoader`, or what is
            no DataLoader, is returned as it is.
        options: `poptorch.Options` of the program that will take the batches.
        program: Training, which drops what does not fill a call, or inference, which keeps it.
        accumulation: Micro-batches in a batch of the user's loader.
        mode: Whether batches are made ahead, in a process of their own.

    Raises:
        UserError: If micro-batches do not divide the batch or have no size, or there are too few
            training data.
    """
    poptorch = import_poptorch()
    if not isinstance(loader, DataLoader) or isinstance(loader, poptorch.DataLoader):
        return loader
    if loader.batch_sampler is None:
        return loader  # its data set gives whole batches
    batches = _batch_arguments(loader, program, accumulation)
    examples = _count(batches.get("sampler"))
    if program.training and examples is not None:
        enforce(enough_data_rule(examples, batches["batch_size"], program))
        _say_what_is_dropped(examples, program.shape.batches.host_batch_size(batches["batch_size"]))
    result = loader_like(
        loader,
        options=options,
        drop_last=program.training,
        mode=poptorch.DataLoaderMode[MODES[mode]],
        **batches,
    )
    note_indices(result, like=loader)
    return result


def _batch_arguments(loader: Any, program: ProgramConfig, accumulation: int) -> Dict[str, Any]:
    """Return what decides which examples stand in which micro-batch."""
    if isinstance(loader.dataset, IterableDataset):
        return {"batch_size": _micro_batch_size(loader.batch_size, program, accumulation)}
    batches = unwrapped_batch_sampler(loader.batch_sampler)
    if type(batches) is BatchSampler:
        micro_batch_size = _micro_batch_size(batches.batch_size, program, accumulation)
        return {"batch_size": micro_batch_size, "sampler": batches.sampler}
    size = getattr(batches, "batch_size", None)
    if not isinstance(size, int):
        raise UserError(
            f"The batch sampler {type(batches).__name__} has batch_size={size}, and "
            "IPUs take micro-batches of one size. Give it the attribute batch_size, the examples "
            "of each of its batches, or use a sampler."
        )
    return {"batch_size": size, "sampler": FlattenedBatchSampler(batches, size)}


def _count(sampler: Any) -> Optional[int]:
    """Return the examples that a sampler draws, if it knows; streams have no sampler."""
    try:
        return len(sampler)
    except (TypeError, NotImplementedError):
        return None


def _micro_batch_size(batch_size: int, program: ProgramConfig, accumulation: int) -> int:
    if program.training:
        return micro_batch_size_of(batch_size, accumulation)
    return -(-batch_size // accumulation)  # an evaluation may be cut as it fits


def _say_what_is_dropped(examples: int, host_batch_size: int) -> None:
    calls, rest = divmod(examples, host_batch_size)
    if rest:
        rank_zero_info(
            f"{rest:,} of {examples:,} training examples are left out of each epoch: they do not "
            f"fill a batch of {host_batch_size} ({calls:,} batches do)."
        )
