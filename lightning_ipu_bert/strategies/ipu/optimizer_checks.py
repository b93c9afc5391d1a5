"""Which optimizers PopTorch computes as torch does."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator, Sequence

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.rules import Violation

OPTIMIZERS = (AdamW, Adam, SGD)
"""What PopTorch computes as torch does, with a state that is known."""

SEVERAL = Violation(
    "configure_optimizers",
    None,
    "gives several optimizers or none, and IPUs run exactly one",
    "Return one; it may have several parameter groups.",
)


@contextmanager
def one_optimizer() -> Iterator[None]:
    """Refuse several optimizers in our words where Lightning does in its own.

    Raises:
        UserError: If a module gives several, and optimizes automatically.
    """
    try:
        yield
    except RuntimeError as error:
        if "multiple optimizers" in str(error):
            raise UserError(str(SEVERAL)) from error
        raise


def optimizer_rules(
    optimizers: Sequence[Optimizer], module: LightningModule, clip: float, lamb: bool
) -> Iterator[Violation]:
    """There is one optimizer, and PopTorch does with it what torch does.

    Args:
        optimizers: Of the module.
        module: Has the parameters.
        clip: Norm to which gradients are clipped; 0 where they are not.
        lamb: Whether LAMB is to take the place of AdamW.
    """
    if len(optimizers) != 1:
        yield SEVERAL
        return
    optimizer = optimizers[0]
    name = type(optimizer).__name__
    if type(optimizer) not in OPTIMIZERS:  # a class derived from one may do something else
        known = ", ".join(kind.__name__ for kind in OPTIMIZERS)
        yield Violation(name, None, "is not possible on IPUs", f"Use {known}, or LAMB by lamb.")
    if lamb and not isinstance(optimizer, AdamW):
        rule = f"takes its numbers from an AdamW, and {name} was given"
        yield Violation("lamb", None, rule, "Use AdamW.")
    if clip and (lamb or not _clips_as_torch_does(optimizer)):
        yield Violation(
            "gradient_clip_val",
            clip,
            f"is not possible with {'LAMB' if lamb else name}: PopTorch clips as torch does for "
            "AdamW, and for Adam without weight decay",
            "Set it to null, or use one of them.",
        )
    yield from _number_rules(optimizer)
    yield from _group_rules(optimizer, module)


def _number_rules(optimizer: Optimizer) -> Iterator[Violation]:
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        for flag in ("amsgrad", "maximize", "dampening"):
            if group.get(flag):
                rule = "is not possible on IPUs as torch does it"
                yield Violation(f"{name}({flag}={group[flag]})", None, rule, f"Leave {flag} out.")
        if not group.get("eps", 1.0) > 0:
            yield Violation("eps", group["eps"], "must be above 0 on IPUs", "E.g. 1e-8.")
        if isinstance(group["lr"], Tensor):
            yield Violation("lr", None, "is a tensor, and PopTorch takes numbers", "Give a float.")


def _clips_as_torch_does(optimizer: Optimizer) -> bool:
    """Return whether PopTorch clips the mean gradient.

    SGD's norm is that of the sum over micro-batches, times the loss scaling; Adam's has the weight
    decay in it. Source: PopART, transforms/clipweightgradientsbynorm.cpp.
    """
    if isinstance(optimizer, AdamW):
        return True
    decays = any(group["weight_decay"] for group in optimizer.param_groups)
    return isinstance(optimizer, Adam) and not decays


def _group_rules(optimizer: Optimizer, module: LightningModule) -> Iterator[Violation]:
    """PopART trains what needs gradients but is in no group, by the optimizer's defaults."""
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in grouped:
            yield Violation(
                f"The parameter {name}",
                None,
                f"is in no group of {type(optimizer).__name__}, and IPUs would train it all the "
                "same",
                "Put it into one, or freeze it: requires_grad_(False).",
            )
