"""`ThroughputMonitor` on a pipeline: a replica counts once, not each of its stages."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ThroughputMonitor

from lightning_ipu_bert._compat.lightning import callbacks_of, throughputs
from lightning_ipu_bert.pipeline.plan import Plan


def count_replicas(trainer: Trainer, plan: Plan) -> None:
    """Configure monitors to count replicas instead of ranks.

    They multiply the samples of a rank by the number of ranks, but the ranks of a replica process
    the same samples. The available FLOP/s of a replica are those of all its ranks.
    """
    callbacks = callbacks_of(trainer)
    ranks = plan.main.ranks_per_replica
    for monitor in callbacks:
        if isinstance(monitor, ThroughputMonitor):
            for throughput in throughputs(monitor):
                throughput.world_size = plan.main.batches.replication_factor
                if monitor.available_flops:
                    throughput.available_flops = monitor.available_flops * ranks
