"""What is checked before any process starts, and what loaders must give."""

from __future__ import annotations

from typing import Any, Iterator, Mapping, Optional

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ipu_bert._compat import has_pipelining
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.batches import micro_batch_size_of
from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.pipeline.interface import check_module
from lightning_ipu_bert.pipeline.partition import partition

REFUSED = {
    "StochasticWeightAveraging": "copies the whole model, of which a rank has only its stages",
    "WeightAveraging": "copies the whole model, of which a rank has only its stages",
    "EMAWeightAveraging": "copies the whole model, of which a rank has only its stages",
    "GradientAccumulationScheduler": "changes accumulation, which is part of the pipeline's plan",
}
"""Callbacks that cannot work on a pipeline, and why."""


def check_devices(config: PipelineConfig, num_processes: int, num_nodes: int) -> None:
    """Check that there are as many ranks as the plan needs.

    Raises:
        UserError: If there are not.
    """
    if num_processes * num_nodes == config.world_size:
        return
    nodes = f" x num_nodes={num_nodes}" if num_nodes > 1 else ""
    raise UserError(
        f"devices={num_processes}{nodes} does not fit {config.num_stages} stages on "
        f"{config.ranks_per_replica} ranks x replication_factor={config.replication_factor}. "
        f"Set devices to {config.world_size}"
        f"{' in all' if num_nodes > 1 else ''}, or change the plan."
    )


def check_torch() -> None:
    """Check that torch can run a pipeline.

    Raises:
        UserError: If it is too old.
    """
    if not has_pipelining():
        raise UserError(
            f"torch {torch.__version__} is too old for a pipeline, which needs the "
            "torch.distributed.pipelining of a newer one (2.13, say). Install that, or train in "
            "one process: --trainer.strategy auto --trainer.devices 1."
        )


def check_run(trainer: Trainer, module: Optional[LightningModule], config: PipelineConfig) -> None:
    """Check a run before its processes start.

    Raises:
        UserError: If the module cannot be cut as planned, or the Trainer asks for what a pipeline
            does in another way or not at all.
    """
    if module is not None:
        check_module(module)
        blocks = list(module.pipeline_blocks())  # type: ignore[operator]
        partition(blocks, config.layers_per_stage)
    if trainer.accumulate_grad_batches != 1:
        raise UserError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} must be 1 on a pipeline, "
            "which accumulates over its micro-batches. Set the strategy's "
            "gradient_accumulation_steps instead."
        )
    refuse_callbacks(trainer, REFUSED)


def refuse_callbacks(trainer: Trainer, refused: Mapping[str, str]) -> None:
    """Check that no callback is of a kind that cannot work.

    Args:
        trainer: Has the callbacks.
        refused: Names of kinds, and what each does that cannot be.

    Raises:
        UserError: If one is.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind in type(callback).__mro__:
            if kind.__name__ in refused:
                reason = refused[kind.__name__]
                raise UserError(f"{kind.__name__} {reason}. Remove it, or use another strategy.")


def check_loaders(loaders: Any, config: PipelineConfig) -> None:
    """Check that micro-batches divide the batches of loaders.

    Raises:
        UserError: If they do not.
    """
    for loader in _loaders(loaders):
        if loader.batch_size is not None:
            micro_batch_size_of(loader.batch_size, config.gradient_accumulation_steps)


def without_repeats(
    loader: object, module: Optional[LightningModule], config: PipelineConfig
) -> object:
    """Return a loader that shares its examples among replicas, each exactly once.

    Lightning's sampler for evaluation repeats some, so that all replicas have equally many; their
    scores would count twice. Replicas of a pipeline need not have equally many batches.
    """
    trainer = getattr(module, "_trainer", None)
    sampler = getattr(loader, "sampler", None)
    evaluating = trainer is not None and not trainer.training
    if not (evaluating and isinstance(loader, DataLoader) and type(sampler) is DistributedSampler):
        return loader
    unrepeated = UnrepeatedDistributedSampler(
        sampler.dataset, sampler.num_replicas, sampler.rank, shuffle=False
    )
    return _update_dataloader(loader, unrepeated)


def _loaders(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, DataLoader):
        yield loaders
    elif isinstance(loaders, dict):
        for loader in loaders.values():
            yield from _loaders(loader)
    elif isinstance(loaders, (list, tuple)):
        for loader in loaders:
            yield from _loaders(loader)
