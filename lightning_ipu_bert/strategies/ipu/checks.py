"""Checks of a run before programs are compiled."""

from __future__ import annotations

from typing import Any, Iterator, Optional, Tuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_ipu_bert._compat.lightning import callbacks_of, every_n_train_steps
from lightning_ipu_bert.pipeline.blocks import block_rules, outline_of
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig
from lightning_ipu_bert.pipeline.ipu.program import ProgramConfig, program_rules
from lightning_ipu_bert.pipeline.plan import Plan, resolve
from lightning_ipu_bert.pipeline.protocol import has_own_weights, module_rules
from lightning_ipu_bert.pipeline.rules import Violation, enforce
from lightning_ipu_bert.strategies import refusals
from lightning_ipu_bert.strategies.ipu.hardware import check_hardware, check_poprun
from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch
from lightning_ipu_bert.strategies.pipelined import PipelinedModule

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def resolve_run(
    trainer: Trainer, module: PipelinedModule, config: IPUConfig, auto_round: bool
) -> Plan:
    """Check a run and resolve its plan.

    Args:
        trainer: The Trainer of the run.
        module: The module.
        config: The configuration.
        auto_round: Whether to reserve more IPUs than the programs use.

    Raises:
        UserError: If the module cannot be pipelined as configured, PopTorch could not compile the
            programs, or the Trainer uses a feature that IPUs do not support.
    """
    enforce(module_rules(module))
    outline = outline_of(module)
    enforce(block_rules(outline))
    strategy = trainer.strategy
    assert isinstance(strategy, ParallelStrategy)
    enforce(device_rules(len(strategy.parallel_devices or []), config, auto_round))
    training, inference = programs_of(trainer, config)
    plan = resolve(
        outline,
        None if training is None else training.shape,
        None if inference is None else inference.shape,
        recompute=config.recompute_checkpoint_every_layer,
        replicated_tensor_sharding=config.replicated_tensor_sharding,
        optimizer_state_offchip=config.optimizer_state_offchip,
    )
    for program in (training, inference):
        if program is not None:
            enforce(program_rules(program, auto_round))
    if training is not None:
        enforce(trainer_rules(trainer, module, config.device_iterations))
    return plan


def check_sdk(config: IPUConfig, plan: Plan, module: PipelinedModule, compile_only: bool) -> None:
    """Check that PopTorch and enough IPUs are available.

    Raises:
        UserError: If they are not.
    """
    import_poptorch(f"--trainer.devices {config.training.shape.num_devices}")
    check_poprun(config, has_own_weights(module))
    if not compile_only:
        check_hardware(max(p.shape.num_devices for p in (plan.training, plan.inference) if p))


def programs_of(
    trainer: Trainer, config: IPUConfig
) -> Tuple[Optional[ProgramConfig], Optional[ProgramConfig]]:
    """Return the training and the inference program, each None if the run does not need it."""
    trains = trainer.state.fn == TrainerFn.FITTING
    evaluates = not trains or trainer.enable_validation
    return config.training if trains else None, config.inference if evaluates else None


def device_rules(given: int, config: IPUConfig, auto_round: bool) -> Iterator[Violation]:
    """The devices of the Trainer must match the stages and replicas of training."""
    shape = config.training.shape
    if given and given != shape.num_devices and not auto_round:
        yield Violation(
            "devices",
            given,
            f"must be {shape.num_devices}: {shape.num_stages} stages x replication_factor="
            f"{shape.batches.replication_factor}",
            f"Set devices to {shape.num_devices}, remove it, or change the stages or replicas.",
        )


def loss_scaling_rule(loss_scaling: Optional[float]) -> Iterator[Violation]:
    """The loss scaling must be a positive number."""
    if loss_scaling is not None and not 0 < loss_scaling < float("inf"):
        yield Violation(
            "loss_scaling",
            loss_scaling,
            "must be above 0 and finite",
            "Use a power of two, e.g. 128, or null.",
        )


def node_rule(num_nodes: int) -> Iterator[Violation]:
    """IPUs of other machines are used by poprun, not by Lightning."""
    if num_nodes != 1:
        yield Violation(
            "num_nodes",
            num_nodes,
            "must be 1 on IPUs, whose processes are started by poprun",
            "Set it to 1, and start the processes of all machines with poprun.",
        )


def batch_norm_rule(module: nn.Module, replicas: int, options: Any) -> Iterator[Violation]:
    """Replicas need statistics of their own: PopTorch cannot broadcast buffers."""
    norms = [n for n, part in module.named_modules() if isinstance(part, BATCH_NORMS)]
    if replicas > 1 and norms and options.broadcast_buffers:
        yield Violation(
            f"{type(module).__name__}.{norms[0]}",
            None,
            f"updates statistics in training, which replication_factor={replicas} cannot keep "
            "equal on all replicas",
            "If they may differ, pass edit_options=lambda options, training: "
            "options.broadcastBuffers(False) to IPUStrategy.",
        )


def trainer_rules(
    trainer: Trainer, module: LightningModule, device_iterations: int
) -> Iterator[Violation]:
    """A Trainer must not use features in training that IPUs do not support."""
    name = type(module).__name__
    if not module.automatic_optimization:
        yield Violation(
            name,
            None,
            "uses manual optimization, but on IPUs backward and update are in the compiled program",
            "Set automatic_optimization to True.",
        )
    yield from refusals.accumulation_rule(trainer)
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        yield Violation(
            "gradient_clip_algorithm",
            "value",
            "is not supported on IPUs: PopTorch clips by norm only",
            "Use 'norm'.",
        )
    for hook in ("configure_gradient_clipping", "optimizer_step"):
        if is_overridden(hook, module, LightningModule):
            yield Violation(
                name,
                None,
                f"overrides {hook}, but gradients and updates on IPUs are not on the host",
                "Remove the override, or use another strategy.",
            )
    yield from refusals.callback_rules(trainer, refusals.ON_IPUS)
    yield from _interval_rules(trainer, device_iterations)


def _interval_rules(trainer: Trainer, updates: int) -> Iterator[Violation]:
    for name, value in _intervals(trainer):
        if value % updates:
            yield Violation(
                name,
                value,
                f"must be divisible by device_iterations={updates}, the weight updates per call",
                "Use a multiple of it, or device_iterations=1.",
            )
    between = trainer.val_check_interval
    if updates > 1 and isinstance(between, int):
        yield Violation(
            "val_check_interval",
            between,
            f"counts batches, but with device_iterations={updates} a batch is {updates} updates",
            "Set it to a fraction of the epoch, e.g. 0.5.",
        )


def is_dev_run(trainer: Trainer) -> bool:
    """Return whether the Trainer runs a few batches only, which are calls on IPUs."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _intervals(trainer: Trainer) -> Iterator[Tuple[str, int]]:
    """Yield the intervals that count updates."""
    if trainer.max_steps and trainer.max_steps > 0 and not is_dev_run(trainer):
        yield "max_steps", trainer.max_steps
    callbacks = callbacks_of(trainer)
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and every_n_train_steps(callback):
            yield "every_n_train_steps", every_n_train_steps(callback)
