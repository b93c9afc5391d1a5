"""Lightning's `ThroughputMonitor` on a pipeline: a replica counts once, not each of its stages."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ThroughputMonitor

from lightning_ipu_bert.pipeline.config import PipelineConfig


def count_replicas(trainer: Trainer, config: PipelineConfig) -> None:
    """Let monitors take a replica for their device.

    They multiply what a rank has seen by the number of ranks, but the ranks of a replica see the
    same examples. A replica has the FLOP/s of all its ranks, by which they measure the utilisation.
    """
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, ThroughputMonitor):
            for throughput in callback._throughputs.values():
                throughput.world_size = config.replication_factor
                if callback.available_flops:
                    throughput.available_flops = callback.available_flops * config.ranks_per_replica
