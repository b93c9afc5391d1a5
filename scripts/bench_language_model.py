"""What a module of a user gains from `KeepFreedMemory`, `use_fused_steps` and `Dropout`.

    python scripts/bench_language_model.py [--pairs 5] [--updates 40]

The language model of the tests at 6 layers and width 384 with dropout 0.1: 16 sequences of 256
tokens, AdamW, bf16-mixed. Each run is a process of its own, those of a round follow each other;
the clock starts after 10 updates. Also printed: the peak of the memory of the process. Nothing else
should run beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Tuple

import lightning.pytorch as pl
import tests_path  # noqa: F401
import torch
from bench_hf_trainer import our_trainer
from language_model import LanguageModel, Sentences
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override
from update_clock import LightningClock

from lightning_ipu_bert import Dropout, KeepFreedMemory, use_fused_steps

SIDES = ("plain", "memory", "fused", "dropout", "all")
BATCH, LENGTH = 16, 257


class Model(LanguageModel):  # type: ignore[misc]  # tests are untyped
    """The language model with AdamW, fused or not."""

    def __init__(self, fused: bool, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.fused = fused

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4)
        if self.fused:
            use_fused_steps(optimizer)
        return optimizer


class TokenClock(LightningClock):
    """Notes updates; batches have no lengths."""

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.should_stop = trainer.should_stop or self.clock.tick()


def with_cheap_dropout(module: nn.Module) -> None:
    """Replace all dropouts of a module, as a user would."""
    for name, child in module.named_children():
        if type(child) is nn.Dropout:
            setattr(module, name, Dropout(child.p))
        else:
            with_cheap_dropout(child)


def train(side: str, out: str, updates: int) -> None:
    """Train as one side, and write its seconds and its memory."""
    pl.seed_everything(1)
    model = Model(side in ("fused", "all"), width=384, dropout=0.1)
    if side in ("dropout", "all"):
        with_cheap_dropout(model)
    callbacks: List[pl.Callback] = [TokenClock(out, updates)]
    if side in ("memory", "all"):
        callbacks.append(KeepFreedMemory())
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(folder, precision="bf16-mixed", callbacks=callbacks)
        trainer.fit(model, DataLoader(Sentences(100 * BATCH, LENGTH), BATCH))
    result = json.loads(Path(out).read_text("utf8"))
    result["kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path(out).write_text(json.dumps(result), "utf8")


def measure(side: str, updates: int) -> Tuple[float, float]:
    """Return examples per second and the peak memory in MiB of a process of a side."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, __file__, "--side", side, "--out", file.name]
        done = subprocess.run([*command, "--updates", str(updates)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        result = json.loads(Path(file.name).read_text("utf8"))
    return BATCH * updates / result["seconds"], result["kib"] / 1024


def main() -> None:
    """Compare the sides, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        train(options.side, options.out, options.updates)
        return
    found: Dict[str, List[Tuple[float, float]]] = {side: [] for side in SIDES}
    for _ in range(options.pairs):
        for side in SIDES:
            found[side].append(measure(side, options.updates))
    for side in SIDES:
        ratios = [ours[0] / plain[0] for ours, plain in zip(found[side], found["plain"])]
        speed, memory = (statistics.median(column) for column in zip(*found[side]))
        print(
            f"{side:8} {speed:.1f} examples/s, {statistics.median(ratios):.2f}x plain "
            f"({min(ratios):.2f} .. {max(ratios):.2f}), peak {memory:.0f} MiB"
        )


if __name__ == "__main__":
    main()
