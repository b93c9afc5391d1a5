"""Optimizers whose updates by PopTorch are equal to those by torch."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator, Sequence

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_ipu_bert._compat.lightning import rejects_several_optimizers
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.rules import Violation

OPTIMIZERS = (AdamW, Adam, SGD)
"""Optimizers that PopTorch computes as torch does, with a known state."""

SEVERAL = Violation(
    "configure_optimizers",
    None,
    "must return exactly one optimizer on IPUs",
    "Return one; it may have several parameter groups.",
)


@contextmanager
def one_optimizer() -> Iterator[None]:
    """Replace the error of Lightning about several optimizers, which suggests manual optimization.

    Raises:
        UserError: If a module has several optimizers.
    """
    try:
        yield
    except RuntimeError as error:
        if rejects_several_optimizers(error):
            raise UserError(str(SEVERAL)) from error
        raise


def optimizer_rules(
    optimizers: Sequence[Optimizer], module: LightningModule, clip: float, lamb: bool
) -> Iterator[Violation]:
    """There must be one optimizer, whose updates are equal with PopTorch and torch.

    Args:
        optimizers: Optimizers of the module.
        module: Holds the parameters.
        clip: Maximum norm of gradients; 0 disables clipping.
        lamb: Whether LAMB replaces AdamW.
    """
    if len(optimizers) != 1:
        yield SEVERAL
        return
    optimizer = optimizers[0]
    name = type(optimizer).__name__
    if type(optimizer) not in OPTIMIZERS:  # a subclass may compute other updates
        known = ", ".join(f"torch.optim.{kind.__name__}" for kind in OPTIMIZERS)
        own = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        yield Violation(own, None, "is not supported on IPUs", f"Use {known}, or LAMB by lamb.")
    if lamb and not isinstance(optimizer, AdamW):
        rule = f"takes its hyperparameters from AdamW, but the optimizer is {name}"
        yield Violation("lamb", None, rule, "Use AdamW.")
    if clip and (lamb or not _clips_as_torch_does(optimizer)):
        yield Violation(
            "gradient_clip_val",
            clip,
            f"is not supported with {'LAMB' if lamb else name}: PopTorch clips as torch does only "
            "for AdamW, and for Adam without weight decay",
            "Set it to null, or use one of these.",
        )
    yield from _number_rules(optimizer)
    yield from _group_rules(optimizer, module)


def _number_rules(optimizer: Optimizer) -> Iterator[Violation]:
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        for flag in ("amsgrad", "maximize", "dampening"):
            if group.get(flag):
                rule = "is not supported on IPUs as in torch"
                yield Violation(f"{name}({flag}={group[flag]})", None, rule, f"Remove {flag}.")
        if not group.get("eps", 1.0) > 0:
            yield Violation("eps", group["eps"], "must be above 0 on IPUs", "E.g. 1e-8.")
        if isinstance(group["lr"], Tensor):
            yield Violation(
                "lr", None, "is a tensor, but PopTorch requires a number", "Pass a float."
            )


def _clips_as_torch_does(optimizer: Optimizer) -> bool:
    """Return whether PopTorch clips the mean gradient.

    For SGD it clips the sum over micro-batches times the loss scaling; for Adam the gradient
    includes the weight decay. Source: PopART, transforms/clipweightgradientsbynorm.cpp.
    """
    if isinstance(optimizer, AdamW):
        return True
    decays = any(group["weight_decay"] for group in optimizer.param_groups)
    return isinstance(optimizer, Adam) and not decays


def _group_rules(optimizer: Optimizer, module: LightningModule) -> Iterator[Violation]:
    """All trained parameters must be in a group: PopART updates others with the defaults."""
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in grouped:
            yield Violation(
                f"The parameter {name}",
                None,
                f"is in no parameter group of {type(optimizer).__name__}, but IPUs would train it",
                "Add it to one, or freeze it with requires_grad_(False).",
            )
