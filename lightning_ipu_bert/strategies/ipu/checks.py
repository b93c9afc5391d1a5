"""What is checked before anything is compiled."""

from __future__ import annotations

from typing import Any, Iterator, List, Sequence, Tuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.interface import check_module
from lightning_ipu_bert.pipeline.ipu_config import Graph, IPUConfig
from lightning_ipu_bert.pipeline.ipu_rules import check_graph
from lightning_ipu_bert.pipeline.partition import partition
from lightning_ipu_bert.strategies.checks import refuse_callbacks

ON_DEVICE = "cannot follow the weights, which change on the IPUs and not on the host"
REFUSED = {
    "StochasticWeightAveraging": ON_DEVICE,
    "WeightAveraging": ON_DEVICE,
    "EMAWeightAveraging": ON_DEVICE,
    "ModelPruning": ON_DEVICE,
    "GradientAccumulationScheduler": "changes accumulation, which is compiled into the program",
    "BatchSizeFinder": "changes the batch size, which is compiled into the program",
    "BaseFinetuning": "changes which parameters train, which is compiled into the program",
    "LearningRateFinder": "goes back to the state before it, and the optimizer's is on the IPUs",
}
"""Callbacks that cannot work on IPUs, and why."""

OPTIMIZERS = (AdamW, Adam, SGD)
"""What PopTorch computes as torch does, with a state that is known."""


def check_shape_of_plan(stages_per_rank: int, schedule: str) -> None:
    """Check what only ranks can have.

    Raises:
        UserError: If it is asked for.
    """
    if stages_per_rank != 1:
        raise UserError(
            f"stages_per_rank={stages_per_rank} is not possible on IPUs: each holds one stage. "
            "Set it to 1, or leave it out."
        )
    if schedule != "1f1b":
        raise UserError(
            f"schedule={schedule!r} is not possible on IPUs: PopTorch runs its own, which is "
            "1f1b. Leave it out."
        )


SEVERAL_OPTIMIZERS = (
    "configure_optimizers gives several optimizers or none, and IPUs run exactly one. Return one; "
    "it may have several parameter groups."
)


def graphs_of(trainer: Trainer, config: IPUConfig) -> List[Graph]:
    """Return what will be compiled for what the Trainer is about to do.

    Args:
        trainer: Knows whether it trains, evaluates, or does both.
        config: How the module runs.
    """
    trains = trainer.state.fn == TrainerFn.FITTING
    graphs = [config.training] if trains else []
    if not trains or trainer.enable_validation:
        graphs.append(config.inference)
    return graphs


def check_graphs(graphs: Sequence[Graph], module: LightningModule, auto: bool) -> None:
    """Check that a module can be cut as planned.

    Args:
        graphs: What will be compiled.
        module: The module.
        auto: Whether more IPUs may be taken than are used.

    Raises:
        UserError: If it cannot.
    """
    check_module(module)
    blocks = list(module.pipeline_blocks())  # type: ignore[operator]
    for graph in graphs:
        partition(blocks, graph.layers_per_ipu)
        check_graph(graph, auto)


def check_trainer(trainer: Trainer, module: LightningModule, config: IPUConfig) -> None:
    """Check that a Trainer that trains asks for nothing that IPUs do in another way or not at all.

    Raises:
        UserError: If it does.
    """
    if not module.automatic_optimization:
        raise UserError(
            f"{type(module).__name__} optimizes manually, and on IPUs backward and update happen "
            "in the compiled program. Set automatic_optimization to True."
        )
    if trainer.accumulate_grad_batches != 1:
        raise UserError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} must be 1 on IPUs, which "
            "accumulate over micro-batches. Set the strategy's gradient_accumulation_steps instead."
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise UserError(
            "gradient_clip_algorithm='value' is not possible on IPUs: PopTorch clips by norm only. "
            "Use 'norm'."
        )
    for hook in ("configure_gradient_clipping", "optimizer_step"):
        if is_overridden(hook, module, LightningModule):
            raise UserError(
                f"{type(module).__name__} overrides {hook}, but gradients and updates never come "
                "to the host on IPUs. Remove the override, or use another strategy."
            )
    refuse_callbacks(trainer, REFUSED)
    _check_intervals(trainer, config.device_iterations)


def _check_intervals(trainer: Trainer, updates: int) -> None:
    for name, value in _intervals(trainer):
        if value % updates:
            raise UserError(
                f"{name}={value} is no multiple of device_iterations={updates}, the weight updates "
                "of one call. Use a multiple of it, or device_iterations=1."
            )
    between = trainer.val_check_interval
    if updates > 1 and isinstance(between, int):
        raise UserError(
            f"val_check_interval={between} counts batches, and with device_iterations={updates} "
            f"each is {updates} updates. Give a share of the epoch, e.g. 0.5."
        )


def _intervals(trainer: Trainer) -> Iterator[Tuple[str, int]]:
    """Name the numbers of updates at which something happens."""
    if trainer.max_steps and trainer.max_steps > 0:
        yield "max_steps", trainer.max_steps
    if trainer.loggers and trainer.log_every_n_steps:  # type: ignore[attr-defined]
        yield "log_every_n_steps", trainer.log_every_n_steps  # type: ignore[attr-defined]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback._every_n_train_steps:
            yield "every_n_train_steps", callback._every_n_train_steps


def check_optimizers(
    optimizers: Any, module: LightningModule, clip: float, lamb: bool
) -> Optimizer:
    """Return the one optimizer.

    Raises:
        UserError: If there are several, or PopTorch has no such one, or it does something else than
            torch's.
    """
    if len(optimizers) != 1:
        raise UserError(SEVERAL_OPTIMIZERS)
    optimizer: Optimizer = optimizers[0]
    name = type(optimizer).__name__
    if type(optimizer) not in OPTIMIZERS:  # a class derived from one may do something else
        known = ", ".join(kind.__name__ for kind in OPTIMIZERS)
        raise UserError(f"{name} is not possible on IPUs. Use {known}, or LAMB by lamb.")
    if lamb and not isinstance(optimizer, AdamW):
        raise UserError(f"lamb takes its numbers from an AdamW, and {name} was given. Use AdamW.")
    if clip and (lamb or not _clips_as_torch_does(optimizer)):
        raise UserError(
            f"gradient_clip_val={clip} is not possible with {'LAMB' if lamb else name}: PopTorch "
            "clips as torch does for AdamW, and for Adam without weight decay. Set it to null, or "
            "use one of them."
        )
    for group in optimizer.param_groups:
        for flag in ("amsgrad", "maximize", "dampening"):
            if group.get(flag):
                raise UserError(
                    f"{name}({flag}={group[flag]}) is not possible on IPUs as torch does it. Leave "
                    f"{flag} out."
                )
        if not group.get("eps", 1.0) > 0:
            raise UserError(f"eps={group['eps']} must be above 0 on IPUs, e.g. 1e-8.")
        if isinstance(group["lr"], Tensor):
            raise UserError("lr is a tensor, and PopTorch takes numbers. Give lr as a float.")
    _check_groups(optimizer, module)
    return optimizer


def _clips_as_torch_does(optimizer: Optimizer) -> bool:
    """Whether PopTorch clips the mean gradient.

    SGD's norm is that of the sum over micro-batches, times the loss scaling; Adam's has the weight
    decay in it. Source: PopART, transforms/clipweightgradientsbynorm.cpp.
    """
    if isinstance(optimizer, AdamW):
        return True
    decays = any(group["weight_decay"] for group in optimizer.param_groups)
    return isinstance(optimizer, Adam) and not decays


def _check_groups(optimizer: Optimizer, module: LightningModule) -> None:
    """PopART trains what needs gradients but is in no group, by the optimizer's defaults."""
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in grouped:
            raise UserError(
                f"The parameter {name} is in no group of {type(optimizer).__name__}, and IPUs "
                "would train it all the same. Put it into one, or freeze it: requires_grad_(False)."
            )
