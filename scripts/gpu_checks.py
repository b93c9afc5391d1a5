"""The checks of check_gpu: training in every mode beside plain Lightning on the same device.

Every run is a fork of a process that has not used the GPU.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional

import tests_path  # noqa: F401
import torch
from bench_hf_trainer import LossHistory
from lightning.pytorch.plugins.precision import MixedPrecision
from pipeline_sides import MINILM, fit
from ranks import run_ranks

UPDATES, EXAMPLES, MICRO_BATCHES = 20, 16, 4
FIRST_SCALE = 2.0**24
"""Of 16-mixed: so large that the first gradients overflow."""
TOLERANCES = {"32-true": 1e-4, "bf16-mixed": 2e-2, "16-mixed": 5e-3}
"""Largest relative difference of losses; one stage processes micro-batches, plain the batch."""


class Row(NamedTuple):
    """A row of the table."""

    check: str
    result: str
    asked: str
    passed: bool = True


class Run(NamedTuple):
    """What a run of training did."""

    losses: List[float]
    mib: float
    """Peak of the memory of the GPU; 0 on CPUs."""
    scale: Optional[float]
    """Last loss scale of 16-mixed."""

    def difference(self, other: Run) -> float:
        """Return the largest relative difference of losses."""
        return max(abs(a - b) / abs(b) for a, b in zip(self.losses, other.losses))


class Model(NamedTuple):
    """What is trained, and where."""

    size: Dict[str, Any]
    length: int
    gpus: int


def train(
    model: Model,
    precision: str = "32-true",
    plan: Optional[Dict[str, Any]] = None,
    ranks: int = 1,
    examples: int = EXAMPLES,
) -> Run:
    """Train without a plan, or by `PipelineParallelStrategy` with one; return the first rank's."""
    first: Run = run_ranks(ranks, train_rank, model, precision, plan, examples, timeout=240)[0]
    return first


def train_rank(model: Model, precision: str, plan: Optional[Dict[str, Any]], examples: int) -> Run:
    """Train as one of the ranks."""
    history, scaler = LossHistory(), None
    chosen: Dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cuda", init_scale=FIRST_SCALE)
        chosen = {"plugins": [MixedPrecision("16-mixed", "cuda", scaler)]}
    accelerator = "gpu" if model.gpus else "cpu"
    recipe = {"accelerator": accelerator, "gradient_clip_val": 1.0, **chosen}
    fit(model.size, examples, UPDATES, plan, [history], model.length, **recipe)
    mib = torch.cuda.max_memory_allocated() / 2**20 if model.gpus else 0.0
    return Run(history.losses, mib, scaler.get_scale() if scaler is not None else None)


def one_stage(**options: Any) -> Dict[str, Any]:
    """Return the plan of one stage on one device."""
    plan = {"layers_per_stage": [-1], "gradient_accumulation_steps": MICRO_BATCHES}
    return {**plan, "schedule": "1f1b", **options}


def model_for(short: bool, gpus: int) -> Model:
    """Return MiniLM, or two layers of it."""
    return (
        Model({**MINILM, "num_hidden_layers": 2}, 32, gpus) if short else Model(MINILM, 384, gpus)
    )


def check_precisions(model: Model) -> List[Row]:
    """Compare one stage with plain Lightning in every precision."""
    rows = []
    for precision in ["32-true", "bf16-mixed", *(["16-mixed"] if model.gpus else [])]:
        plain = train(model, precision)
        stage = train(model, precision, one_stage())
        row = compared(f"one stage and plain Lightning, {precision}", stage, plain, precision)
        if stage.scale is not None:
            skips = stage.scale < FIRST_SCALE and stage.scale == plain.scale
            scales = f"; scale {FIRST_SCALE:.0f} to {stage.scale:.0f} and {plain.scale:.0f}"
            asked = f"{row.asked}, overflows skipped alike"
            row = Row(row.check, row.result + scales, asked, row.passed and skips)
        rows.append(row)
    if not model.gpus:
        rows.append(Row("16-mixed with an overflow", "not here: needs a GPU", ""))
    return rows


def check_modes(model: Model) -> List[Row]:
    """Compare one stage with itself in every mode that saves memory."""
    rows, stage = [], train(model, plan=one_stage())
    for name, mode in (
        ("optimizer state in host memory", "optimizer_state_offchip"),
        ("recomputation", "recompute_checkpoint_every_layer"),
    ):
        other = train(model, plan=one_stage(**{mode: True}))
        row = compared(name, other, stage)
        before, after = stage.mib, other.mib
        memory = f"; peak {before:.0f} to {after:.0f} MiB" if after else ""
        less = not after or after < before
        asked = f"{row.asked}, less memory" if after else row.asked
        rows.append(Row(row.check, row.result + memory, asked, row.passed and less))
    return rows


def compared(name: str, run: Run, beside: Run, precision: str = "32-true") -> Row:
    """Return the row that compares the losses of two runs."""
    difference, tolerance = run.difference(beside), TOLERANCES[precision]
    fell = run.losses[-1] < run.losses[0]
    result = f"losses differ by {difference:.0e}; {run.losses[0]:.3f} to {run.losses[-1]:.3f}"
    return Row(name, result, f"<= {tolerance:.0e}", difference <= tolerance and fell)


def check_ranks(model: Model) -> List[Row]:
    """Compare two ranks, as stages and as replicas, with one: by NCCL on GPUs, by gloo on CPUs."""
    if model.gpus == 1:
        return [Row("NCCL, 2 x 1 and 1 x 2", "not here: needs two GPUs", "")]
    backend, half = "NCCL" if model.gpus else "gloo", EXAMPLES // 2
    two_stages = train(model, plan=one_stage(layers_per_stage=[-1, -1]), ranks=2)
    replicas = one_stage(replication_factor=2, gradient_accumulation_steps=MICRO_BATCHES // 2)
    # Both replicas train on the same half: their mean is that of one.
    two_replicas = train(model, plan=replicas, ranks=2, examples=half)
    return [
        compared(f"{backend}, 2 x 1 and plain Lightning", two_stages, train(model)),
        compared(
            f"{backend}, 1 x 2 and plain Lightning", two_replicas, train(model, examples=half)
        ),
    ]
