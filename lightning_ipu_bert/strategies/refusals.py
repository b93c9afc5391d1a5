"""Features of a Trainer that stages do not support: callbacks, accumulation, precision plugins."""

from __future__ import annotations

from typing import Dict, Iterator, Mapping, Sequence, Type

from lightning.pytorch import Callback, Trainer, callbacks
from lightning.pytorch.plugins.precision import Precision

from lightning_ipu_bert._compat.lightning import callbacks_of, synchronizes_batch_norm
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.rules import Violation

COPIES = "copies the full model, of which a rank has only its stages"
ON_DEVICE = "does not see the weights, which are updated on the IPUs"

Reasons = Mapping[Type[Callback], str]
"""Callbacks that are not supported, and why."""


def _available(reasons: Mapping[str, str]) -> Reasons:
    """Return the reasons by class, without callbacks that this version of Lightning lacks."""
    known: Dict[str, Type[Callback]] = vars(callbacks)
    return {known[name]: reason for name, reason in reasons.items() if name in known}


ON_RANKS = _available(
    {
        "StochasticWeightAveraging": COPIES,
        "ModelPruning": "prunes parameters of all stages, of which a rank has only some",
        "GradientAccumulationScheduler": "changes accumulation, which is part of the plan",
    }
)

ON_IPUS = _available(
    {
        "StochasticWeightAveraging": ON_DEVICE,
        "WeightAveraging": ON_DEVICE,
        "EMAWeightAveraging": ON_DEVICE,
        "ModelPruning": ON_DEVICE,
        "GradientAccumulationScheduler": "changes accumulation, which is compiled into the program",
        "BatchSizeFinder": "changes the batch size, which is compiled into the program",
        "BaseFinetuning": "changes which parameters train, which is compiled into the program",
        "LearningRateFinder": "restores the optimizer state, which is on the IPUs",
    }
)


def callback_rules(trainer: Trainer, reasons: Reasons) -> Iterator[Violation]:
    """The Trainer must not have callbacks that are not supported."""
    present = callbacks_of(trainer)
    for callback in present:
        for kind, reason in reasons.items():
            if isinstance(callback, kind):
                yield Violation(kind.__name__, None, reason, "Remove it, or use another strategy.")


def accumulation_rule(trainer: Trainer) -> Iterator[Violation]:
    """The Trainer must not accumulate gradients: the strategy does."""
    if trainer.accumulate_grad_batches != 1:
        yield Violation(
            "accumulate_grad_batches",
            trainer.accumulate_grad_batches,
            "must be 1 with a pipeline strategy, which accumulates over micro-batches",
            "Set the strategy's gradient_accumulation_steps instead.",
        )


def batch_norm_rule(trainer: Trainer) -> Iterator[Violation]:
    """BatchNorm must not be synchronized: a stage runs micro-batches at other times elsewhere."""
    if synchronizes_batch_norm(trainer.strategy):
        yield Violation(
            "sync_batchnorm",
            True,
            "is not supported in a pipeline: replicas run the micro-batches of a stage at "
            "different times",
            "Set it to False; statistics are those of a micro-batch.",
        )


def precision_of(
    plugin: Precision, kinds: Sequence[Type[Precision]], supported: Sequence[str], where: str
) -> str:
    """Return the precision of a plugin of Lightning, which is replaced by its counterpart.

    Args:
        plugin: The precision plugin of the Trainer.
        kinds: Plugins of Lightning that have a counterpart.
        supported: Precisions that have a counterpart.
        where: Where the precision is used, for the message.

    Raises:
        UserError: If there is no counterpart.
    """
    precision = str(plugin.precision)
    if precision not in supported:
        raise UserError(
            f"precision={precision!r} is not supported {where}. Use one of {', '.join(supported)}."
        )
    if type(plugin) not in kinds:
        raise UserError(
            f"The precision plugin {type(plugin).__name__} is not supported {where}. Remove it and "
            f"set Trainer(precision=...) to one of {', '.join(supported)}."
        )
    return precision
