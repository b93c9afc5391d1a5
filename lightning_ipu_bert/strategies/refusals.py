"""What of a Trainer cannot work with stages: callbacks, accumulation, precision plugins."""

from __future__ import annotations

from typing import Iterator, List, Mapping, Sequence, Type

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import Precision

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.rules import Violation

COPIES = "copies the whole model, of which a rank has only its stages"
ON_DEVICE = "cannot follow the weights, which change on the IPUs and not on the host"

ON_RANKS: Mapping[str, str] = {
    "StochasticWeightAveraging": COPIES,
    "WeightAveraging": COPIES,
    "EMAWeightAveraging": COPIES,
    "GradientAccumulationScheduler": "changes accumulation, which is part of the pipeline's plan",
}
"""Callbacks that cannot work on a pipeline of ranks, and why."""

ON_IPUS: Mapping[str, str] = {
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


def callback_rules(trainer: Trainer, refused: Mapping[str, str]) -> Iterator[Violation]:
    """No callback is of a kind that cannot work.

    Args:
        trainer: Has the callbacks.
        refused: Names of kinds, and why each cannot work.
    """
    callbacks: List[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        for kind in type(callback).__mro__:
            if kind.__name__ in refused:
                reason = refused[kind.__name__]
                yield Violation(kind.__name__, None, reason, "Remove it, or use another strategy.")


def accumulation_rule(trainer: Trainer) -> Iterator[Violation]:
    """The Trainer does not accumulate: the micro-batches are the accumulation."""
    if trainer.accumulate_grad_batches != 1:
        yield Violation(
            "accumulate_grad_batches",
            trainer.accumulate_grad_batches,
            "must be 1 with pipeline stages, which accumulate over their micro-batches",
            "Set the strategy's gradient_accumulation_steps instead.",
        )


def precision_of(
    plugin: Precision, kinds: Sequence[Type[Precision]], supported: Sequence[str], where: str
) -> str:
    """Return the precision of one of Lightning's own plugins, for its counterpart here.

    Args:
        plugin: What the Trainer has chosen, or the user has given.
        kinds: Lightning's plugins that have a counterpart.
        supported: Precisions that have one.
        where: What the precision is for, for the message.

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
            f"The precision plugin {type(plugin).__name__} is not supported {where}: it does not "
            f"know about stages. Leave it out and give Trainer(precision=...), one of "
            f"{', '.join(supported)}."
        )
    return precision
