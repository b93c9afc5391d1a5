"""Reporting: throughput during training, and a summary at the end."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Callable, Deque, Dict, Iterator, List, NamedTuple, Optional, Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_ipu_bert.pipeline.facts import facts_of

WINDOW = 20
"""Batches over which the throughput is averaged."""


class BatchSize(NamedTuple):
    """Size of a batch."""

    examples: int
    tokens: Tensor
    """Scalar, without padding; a tensor, to avoid a synchronization with the device."""


class Timed(NamedTuple):
    """Duration and size of a batch."""

    seconds: float
    size: BatchSize


@dataclass
class Measurements:
    """Measurements of one fit."""

    begin: float = field(default_factory=time.perf_counter)
    mark: float = 0.0
    """Start of the current batch, in seconds of `time.perf_counter`."""
    first_step: int = 0
    compiled: float = 0.0
    """Compilation seconds that are already subtracted."""
    recent: Deque[Timed] = field(default_factory=lambda: deque(maxlen=WINDOW))
    seconds: float = 0.0
    examples: int = 0
    batches: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    best: Dict[str, float] = field(default_factory=dict)


class TrainingReport(Callback):
    """Logs examples/s and tokens/s, and prints a summary when `fit` ends.

    Validation and compilation for IPUs do not count as training time.
    """

    def __init__(
        self,
        size_of: Callable[[Any], BatchSize],
        best_of: Sequence[str] = (),
        closing_lines: Callable[[Trainer, str], List[str]] = lambda trainer, path: [],
    ) -> None:
        """Create the callback.

        Args:
            size_of: Returns the size of a batch.
            best_of: Metrics whose best value is shown in the summary; higher is better.
            closing_lines: Returns lines to print after the summary, given the Trainer and the path
                of the checkpoint.
        """
        self.size_of = size_of
        self.best_of = best_of
        self.closing_lines = closing_lines
        self.measured = Measurements()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the measurements: a Trainer may fit twice."""
        self.measured = Measurements()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; the step of a resumed run is known only now."""
        self.measured.mark = time.perf_counter()
        self.measured.first_step = trainer.global_step
        self.measured.compiled = facts_of(trainer).compile_seconds

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Count a batch and log the throughput over the last batches."""
        m, compiled, now = self.measured, facts_of(trainer).compile_seconds, time.perf_counter()
        seconds = now - m.mark - (compiled - m.compiled)
        m.mark, m.compiled = now, compiled
        replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        size = BatchSize(*(count * replicas for count in self.size_of(batch)))
        m.recent.append(Timed(seconds, size))
        m.seconds, m.examples, m.batches = (
            m.seconds + seconds,
            m.examples + size.examples,
            m.batches + 1,
        )
        # Lightning divides the loss in `outputs` by the number of accumulated batches.
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        m.loss = m.loss.to(loss.device) + loss
        total = sum(timed.seconds for timed in m.recent)
        speed = {
            "examples/s": sum(timed.size.examples for timed in m.recent) / total,
            "tokens/s": sum(timed.size.tokens for timed in m.recent) / total,
        }
        pl_module.log_dict(speed, prog_bar=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the best scores and exclude the validation from the training time."""
        self.measured.mark = time.perf_counter()
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        best = self.measured.best
        for name, value in trainer.callback_metrics.items():
            if name in self.best_of:
                best[name] = max(float(value), best.get(name, 0.0))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary."""
        if not self.measured.batches:
            return
        path = checkpoint_path(trainer)
        for line in self._summary(trainer):
            rank_zero_info(line)
        if path is not None:
            for line in [f"Checkpoint      {path}", *self.closing_lines(trainer, path)]:
                rank_zero_info(line)

    def _summary(self, trainer: Trainer) -> Iterator[str]:
        m, steps = self.measured, trainer.global_step - self.measured.first_step
        yield f"Run time        {time.perf_counter() - m.begin:.1f} s"
        yield (
            f"Training speed  {m.examples / m.seconds:.2f} examples/s, "
            f"{steps / m.seconds:.3f} steps/s ({steps} steps)"
        )
        yield f"Train loss      {float(m.loss) / m.batches:.4f} (mean)"
        if m.best:
            yield f"Best            {', '.join(f'{k} {v:.2f}' for k, v in sorted(m.best.items()))}"


def checkpoint_path(trainer: Trainer) -> Optional[str]:
    """Return the best checkpoint of a run, otherwise the last one, or None."""
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint):
        return None
    return str(callback.best_model_path or callback.last_model_path) or None
