"""Checks of a run before any process is started."""

from __future__ import annotations

from typing import Any, Iterator, List, Optional, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_ipu_bert._compat.lightning import callbacks_of, datamodule_of
from lightning_ipu_bert._compat.torch import has_pipelining, is_compiled
from lightning_ipu_bert.pipeline.blocks import block_rules, outline_of
from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.pipeline.plan import Plan, resolve
from lightning_ipu_bert.pipeline.protocol import module_rules
from lightning_ipu_bert.pipeline.rules import Violation, enforce
from lightning_ipu_bert.pipeline.schedules import SCHEDULES
from lightning_ipu_bert.strategies import refusals
from lightning_ipu_bert.strategies.distributed.loaders import loader_rules


def torch_rule() -> Iterator[Violation]:
    """The version of torch must support pipelining."""
    if not has_pipelining():
        yield Violation(
            f"torch {torch.__version__}",
            None,
            "is too old for pipelining: it lacks torch.distributed.pipelining",
            "Install a newer version, e.g. 2.13, or train in one process: "
            "--trainer.strategy auto --trainer.devices 1.",
        )


def optimizer_rules(optimizers: Sequence[Optimizer]) -> Iterator[Violation]:
    """Optimizers must not compute with the gradients of all stages."""
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            yield Violation(
                type(optimizer).__name__,
                None,
                "runs several forwards per update and multiplies the gradients of all stages, of "
                "which a rank has only some",
                "Use another optimizer, e.g. AdamW, or another strategy.",
            )


def resolve_run(trainer: Trainer, args: Any, config: PipelineConfig) -> Optional[Plan]:
    """Check a run and resolve its plan.

    Args:
        trainer: The Trainer of the run.
        args: Arguments of its entry point, which may include the module and loaders.
        config: The configuration.

    Returns:
        The plan, or None if there is no module, for which Lightning raises an error itself, or if
        the module creates its blocks in `configure_model`.

    Raises:
        UserError: If the module cannot be pipelined as configured, or the Trainer uses a feature
            that pipelines do not support.
    """
    module: object = next((arg for arg in args if isinstance(arg, LightningModule)), None)
    module = module or trainer.strategy.lightning_module
    fitting = trainer.state.fn == TrainerFn.FITTING
    plan = None
    if isinstance(module, LightningModule):
        enforce(module_rules(module))
        if not is_created_later(module):
            plan = resolve_plan(module, config, fitting)
    enforce(package_rule(trainer))
    enforce(refusals.accumulation_rule(trainer))
    enforce(refusals.batch_norm_rule(trainer))
    enforce(refusals.callback_rules(trainer, refusals.ON_RANKS))
    if fitting:
        enforce(config.training_rules())
        loaders = args[1] if len(args) > 1 and not tunes_batch_size(trainer) else None
        enforce(loader_rules(loaders, config.batches))
    enforce(torch_rule())
    return plan


def resolve_plan(module: LightningModule, config: PipelineConfig, fitting: bool) -> Plan:
    """Return the plan of a run.

    Args:
        module: The module.
        config: The configuration.
        fitting: Whether the run trains.

    Raises:
        UserError: If the module cannot be pipelined as configured.
    """
    outline = outline_of(module)
    enforce(block_rules(outline))
    if fitting:
        enforce(compilation_rule(module, config.schedule))
    return resolve(
        outline,
        config.shape if fitting else None,
        config.shape,
        schedule=config.schedule,
        recompute=config.recompute_checkpoint_every_layer,
        replicated_tensor_sharding=config.replicated_tensor_sharding,
        optimizer_state_offchip=config.optimizer_state_offchip,
    )


def compilation_rule(module: nn.Module, schedule: str) -> Iterator[Violation]:
    """Schedules of torch that split the backward do not support compiled modules."""
    compiled = [name for name, part in module.named_modules() if is_compiled(part)]
    if SCHEDULES[schedule].splits_backward and compiled:
        yield Violation(
            "schedule",
            schedule,
            f"does not support torch.compile, which has compiled {compiled[0]}",
            "Use schedule='1f1b'.",
        )


def is_created_later(module: LightningModule) -> bool:
    """Return whether `configure_model`, which has not run yet, creates the blocks of a module."""
    if not is_overridden("configure_model", module):
        return False
    try:
        outline = outline_of(module)
    except Exception:
        # Of any kind: the methods of an incomplete module may fail. If it is not incomplete, they
        # fail again when the plan is resolved, and nothing is lost.
        return True
    return not set(outline.blocks) <= outline.submodules


def tunes_batch_size(trainer: Trainer) -> bool:
    """Return whether a callback changes the batch size, to any number of examples."""
    return any(isinstance(callback, BatchSizeFinder) for callback in callbacks_of(trainer))


def package_rule(trainer: Trainer) -> Iterator[Violation]:
    """Objects of the Trainer must be of the same package."""
    loggers: List[object] = list(trainer.loggers)
    for part in [*callbacks_of(trainer), *loggers, datamodule_of(trainer)]:
        packages = {kind.__module__.partition(".")[0] for kind in type(part).__mro__}
        if "pytorch_lightning" in packages:
            yield Violation(
                type(part).__name__,
                None,
                "is of the package pytorch_lightning, but the Trainer is of lightning",
                "Import everything from lightning.pytorch.",
            )
