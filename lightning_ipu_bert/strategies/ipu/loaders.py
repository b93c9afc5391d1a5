"""Loaders for IPUs: batches for one call, from `poptorch.DataLoader`."""

from __future__ import annotations

from typing import Any, Dict, Iterator, Literal, Optional

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_ipu_bert._compat.loaders import record_indices, unwrapped_batch_sampler
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.batches import micro_batch_size_of
from lightning_ipu_bert.pipeline.ipu.program import ProgramConfig, enough_data_rule
from lightning_ipu_bert.pipeline.rules import Violation, enforce
from lightning_ipu_bert.strategies.ipu.loader_class import FlattenedBatchSampler, loader_like
from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch

LoaderMode = Literal["sync", "async", "async_rebatched"]
MODES = {"sync": "Sync", "async": "Async", "async_rebatched": "AsyncRebatched"}
"""Mode: name in poptorch.DataLoaderMode."""


def ipu_loader(
    loader: object,
    options: object,
    program: ProgramConfig,
    accumulation: int,
    mode: LoaderMode = "sync",
) -> object:
    """Return a loader whose batches are those of one call of the IPUs.

    Args:
        loader: The loader of the user. A batch consists of the micro-batches of one replica per
            weight update; a custom batch sampler yields micro-batches. A `poptorch.DataLoader`,
            and objects that are not a DataLoader, are returned unchanged.
        options: `poptorch.Options` of the program.
        program: The program; training drops examples that do not fill a call, inference does not.
        accumulation: Micro-batches in a batch of `loader`.
        mode: Whether a separate process prefetches batches.

    Raises:
        UserError: If the batch is not divisible into micro-batches, micro-batches have no size, or
            there is not enough training data.
    """
    poptorch = import_poptorch()
    if isinstance(loader, poptorch.DataLoader):
        enforce(options_rule(loader.options, options, program.training))
        return loader
    if not isinstance(loader, DataLoader):
        return loader
    if loader.batch_sampler is None:
        return loader  # the dataset yields batches
    batches = _batch_arguments(loader, program, accumulation)
    examples = _count(batches.get("sampler"))
    if program.training and examples is not None:
        enforce(enough_data_rule(examples, batches["batch_size"], program))
        _print_dropped(examples, program.shape.batches.host_batch_size(batches["batch_size"]))
    result = loader_like(
        loader,
        options=options,
        drop_last=program.training,
        mode=poptorch.DataLoaderMode[MODES[mode]],
        **batches,
    )
    record_indices(result, like=loader)
    return result


def options_rule(given: object, expected: object, training: bool) -> Iterator[Violation]:
    """A `poptorch.DataLoader` of the user must make batches of the size of a call."""
    needed_counts = _counts(expected)
    for name, found in _counts(given).items():
        needed = needed_counts[name]
        if found != needed:
            yield Violation(
                f"The options of a poptorch.DataLoader with {name}({found})",
                None,
                f"differ from {needed} of the program",
                f"Create it with trainer.strategy.poptorch_options(training={training}).",
            )


def _counts(options: Any) -> Dict[str, int]:
    """Return the numbers of `poptorch.Options` that determine the size of a batch."""
    return {
        "deviceIterations": options.device_iterations,
        "replicationFactor": options.replication_factor,
        "Training.gradientAccumulation": options.Training.gradient_accumulation,
    }


def _batch_arguments(loader: Any, program: ProgramConfig, accumulation: int) -> Dict[str, Any]:
    """Return the arguments that determine the examples of every micro-batch."""
    if isinstance(loader.dataset, IterableDataset):
        return {"batch_size": _micro_batch_size(loader.batch_size, program, accumulation)}
    batches = unwrapped_batch_sampler(loader.batch_sampler)
    if type(batches) is BatchSampler:
        micro_batch_size = _micro_batch_size(batches.batch_size, program, accumulation)
        return {"batch_size": micro_batch_size, "sampler": batches.sampler}
    size = getattr(batches, "batch_size", None)
    if not isinstance(size, int):
        raise UserError(
            f"The batch sampler {type(batches).__name__} has batch_size={size}, but IPUs need "
            "micro-batches of a fixed size. Set its attribute batch_size to the number of examples "
            "of its batches, or use a sampler."
        )
    return {"batch_size": size, "sampler": FlattenedBatchSampler(batches, size)}


def _count(sampler: Any) -> Optional[int]:
    """Return the length of a sampler, or None if it has none."""
    try:
        return len(sampler)
    except (TypeError, NotImplementedError):
        return None


def _micro_batch_size(batch_size: int, program: ProgramConfig, accumulation: int) -> int:
    if program.training:
        return micro_batch_size_of(batch_size, accumulation)
    return -(-batch_size // accumulation)  # evaluation may split batches differently


def _print_dropped(examples: int, host_batch_size: int) -> None:
    calls, remainder = divmod(examples, host_batch_size)
    if remainder:
        rank_zero_info(
            f"{remainder:,} of {examples:,} training examples are dropped in each epoch: the last "
            f"batch of {host_batch_size} is incomplete ({calls:,} batches are complete)."
        )
