"""A Lightning callback and a callback of the Trainer of Hugging Face that time updates."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, List

import lightning.pytorch as pl
import torch
from transformers import TrainerCallback
from typing_extensions import override

WARM_UP = 10
"""Updates before the clock starts."""


class Clock:
    """Times of the ends of updates, written to a file after the last one."""

    def __init__(self, file: str, updates: int) -> None:
        self.file, self.updates = file, updates
        self.times: List[float] = []
        self.lengths: List[List[int]] = []

    def tick(self, write: bool = True) -> bool:
        """Note the end of an update; return whether it was the last one."""
        end = len(self.times) + 1
        if end in (WARM_UP, WARM_UP + self.updates) and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        if end < WARM_UP + self.updates:
            return False
        seconds = self.times[-1] - self.times[WARM_UP - 1]
        result = {"seconds": seconds, "updates": self.updates, "lengths": self.lengths}
        if write:
            Path(self.file).write_text(json.dumps(result), "utf8")
        return True


class LightningClock(pl.Callback):
    """Ends a fit after the last timed update."""

    def __init__(self, file: str, updates: int) -> None:
        self.clock = Clock(file, updates)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.clock.lengths.append(batch["attention_mask"].sum(1).tolist())
        # Every rank of a pipeline sees the whole batch, and stops after the same one.
        trainer.should_stop = trainer.should_stop or self.clock.tick(trainer.is_global_zero)


class TrainerClock(TrainerCallback):
    """Ends a training after the last timed update."""

    def __init__(self, file: str, updates: int) -> None:
        self.clock = Clock(file, updates)

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = self.clock.tick()
