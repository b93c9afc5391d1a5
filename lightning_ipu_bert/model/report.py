"""What a run tells of itself: speed while it trains, and a summary at its end."""

from __future__ import annotations

import shlex
import time
from collections import deque
from typing import Any, Deque, Dict, List, Mapping, Optional, Tuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_ipu_bert.data.squad import SquadDataModule

WINDOW = 20
"""Batches over which the speed is averaged."""

LONGEST_EXAMPLE = 600
"""Characters of the longest passage that is printed in the example of `ask`."""


class TrainingReport(Callback):
    """Logs examples/s and tokens/s (without padding), and prints a summary when `fit` ends.

    The time of validation, and of compiling for IPUs, does not count as training.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from zero: a Trainer may fit twice."""
        self._begin = time.perf_counter()
        self._recent: Deque[Tuple[float, int, Tensor]] = deque(maxlen=WINDOW)
        self._seconds, self._examples, self._batches = 0.0, 0, 0
        self._loss = torch.zeros((), dtype=torch.float64)
        self._best: Dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the first batch; a resumed run knows its step only now."""
        self._mark, self._first_step = time.perf_counter(), trainer.global_step
        self._compiled = getattr(trainer.strategy, "compile_seconds", 0.0)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
    ) -> None:
        """Count a batch and log the speed over the last ones."""
        compiled = getattr(trainer.strategy, "compile_seconds", 0.0)
        self._mark, self._compiled = self._mark + compiled - self._compiled, compiled
        replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        examples = len(batch["input_ids"]) * replicas
        now = time.perf_counter()
        self._recent.append((now - self._mark, examples, batch["attention_mask"].sum() * replicas))
        self._mark, self._seconds = now, self._seconds + now - self._mark
        self._examples, self._batches = self._examples + examples, self._batches + 1
        # Lightning divides the loss it hands out by the number of accumulated batches.
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        self._loss = self._loss.to(loss.device) + loss
        seconds, counts, tokens = zip(*self._recent)
        speed = {
            "examples/s": sum(counts) / sum(seconds),
            "tokens/s": sum(tokens) / sum(seconds),
        }
        pl_module.log_dict(speed, prog_bar=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best scores, and take validation's time off the clock."""
        self._mark = time.perf_counter()
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for name in ("val/exact_match", "val/f1"):
            if name in scores:
                self._best[name] = max(scores[name], self._best.get(name, 0.0))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary."""
        if not self._batches:
            return
        for line in self._summary(trainer):
            rank_zero_info(line)
        command = ask_command(trainer)
        if command:
            rank_zero_info(f"Ask it:\n  {command}")

    def _summary(self, trainer: Trainer) -> List[str]:
        steps = trainer.global_step - self._first_step
        lines = [
            f"Run time        {time.perf_counter() - self._begin:.1f} s",
            f"Training speed  {self._examples / self._seconds:.2f} examples/s, "
            f"{steps / self._seconds:.3f} steps/s ({steps} steps)",
            f"Train loss      {float(self._loss) / self._batches:.4f} (mean)",
        ]
        if self._best:
            best = ", ".join(f"{name} {value:.2f}" for name, value in self._best.items())
            lines.append(f"Best            {best}")
        path = checkpoint_path(trainer)
        return [*lines, f"Checkpoint      {path}"] if path else lines


def checkpoint_path(trainer: Trainer) -> Optional[str]:
    """Return the best checkpoint of a run, or the last one, if any was saved."""
    callback: Any = trainer.checkpoint_callback
    if callback is None:
        return None
    path = callback.best_model_path or getattr(callback, "last_model_path", "")
    return str(path) or None


def ask_command(trainer: Trainer) -> Optional[str]:
    """Return a command line that asks the trained model a question of the validation set."""
    path, data = checkpoint_path(trainer), getattr(trainer, "datamodule", None)
    if path is None:
        return None
    question, passage = "...", "..."
    if isinstance(data, SquadDataModule) and data.has_split("validation"):
        question_set = data.split("validation").question_set
        first = question_set.questions[0]
        if len(question_set.passage_of(first)) <= LONGEST_EXAMPLE:
            question, passage = first.text, question_set.passage_of(first)
    words = ["--model", path, "--question", question, "--context", passage]
    return "python -m lightning_ipu_bert ask " + " ".join(shlex.quote(word) for word in words)
