"""`PipelineConfig`: how a model is cut into stages and how micro-batches flow through them."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Dict, List, NamedTuple, Union

from lightning_ipu_bert.errors import UserError


class Schedule(NamedTuple):
    """What a schedule asks of the plan."""

    least_stages_per_rank: int
    most_stages_per_rank: Union[int, float]
    in_rounds: bool
    """Micro-batches run in equal rounds of about one for each rank."""
    fills_stages: bool
    """At least one micro-batch for each stage."""


SCHEDULES: Dict[str, Schedule] = {
    "gpipe": Schedule(1, 1, in_rounds=False, fills_stages=False),
    "1f1b": Schedule(1, 1, in_rounds=False, fills_stages=True),
    "interleaved_1f1b": Schedule(2, float("inf"), in_rounds=True, fills_stages=False),
    "zero_bubble": Schedule(1, float("inf"), in_rounds=True, fills_stages=False),
}
"""Order of forwards and backwards, by name.

Sources:
    gpipe: Huang et al., GPipe (arXiv:1811.06965), section 2.3. 1f1b, interleaved_1f1b: Narayanan et
    al., Efficient Large-Scale Language Model Training (arXiv:2104.04473), sections 2.2.1 and 2.2.2.
    zero_bubble: Qi et al., Zero Bubble Pipeline Parallelism (arXiv:2401.10241), schedule ZB-H1.
"""


@dataclass(frozen=True)
class PipelineConfig:
    """How a model is cut into stages and how micro-batches flow through them.

    Raises:
        UserError: If a value, or two of them together, break a rule. Rules that need the model, the
            devices or the data are in `lightning_ipu_bert.pipeline.checks`.
    """

    layers_per_stage: List[int]
    """Numbered layers on each stage, e.g. [3, 7, 7, 7]; -1 takes an equal share of the rest. The
    blocks before the layers lie on the first stage, those behind them on the last."""
    replication_factor: int = 1
    """Copies of the pipeline, each with its own part of the data."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of a replica between two weight updates."""
    stages_per_rank: int = 1
    """Stages that one process holds, every n-th one (looped); 1 puts each in its own process."""
    schedule: str = "1f1b"
    """Order of forwards and backwards: gpipe, 1f1b, interleaved_1f1b or zero_bubble."""
    recompute_checkpoint_every_layer: bool = False
    """Keep only the inputs of blocks and compute their insides again in the backward."""
    replicated_tensor_sharding: bool = False
    """Split the optimizer's state over the replicas (RTS, ZeRO stage 1)."""
    optimizer_state_offchip: bool = False
    """Keep the optimizer's state in the host's memory."""

    def __post_init__(self) -> None:
        """Check every rule that the values alone decide."""
        _check_layers(self.layers_per_stage)
        for name in ("replication_factor", "gradient_accumulation_steps", "stages_per_rank"):
            _check_positive(name, getattr(self, name))
        _check_schedule_name(self.schedule)
        if self.num_stages % self.stages_per_rank:
            raise UserError(
                f"stages_per_rank={self.stages_per_rank} does not divide the {self.num_stages} "
                f"stages of layers_per_stage={list(self.layers_per_stage)}. Use a divisor, or "
                "another number of stages."
            )
        self._check_schedule_fits()

    @property
    def num_stages(self) -> int:
        """Stages of one replica."""
        return len(self.layers_per_stage)

    @property
    def ranks_per_replica(self) -> int:
        """Processes that hold one replica."""
        return self.num_stages // self.stages_per_rank

    @property
    def world_size(self) -> int:
        """Processes of the whole job."""
        return self.ranks_per_replica * self.replication_factor

    @property
    def shards_optimizer(self) -> bool:
        """Whether the optimizer's state is split: one replica has nobody to share with."""
        return self.replicated_tensor_sharding and self.replication_factor > 1

    def stages_of(self, position: int) -> List[int]:
        """Return the stages that the rank at `position` within its replica holds, in order."""
        return list(range(position, self.num_stages, self.ranks_per_replica))

    def _check_schedule_fits(self) -> None:
        schedule, steps = SCHEDULES[self.schedule], self.gradient_accumulation_steps
        if self.stages_per_rank < schedule.least_stages_per_rank:
            raise UserError(
                f"schedule='{self.schedule}' interleaves several stages on a rank, but "
                f"stages_per_rank={self.stages_per_rank}. Set stages_per_rank to 2 or more, or "
                "use schedule='1f1b'."
            )
        if self.stages_per_rank > schedule.most_stages_per_rank:
            raise UserError(
                f"schedule='{self.schedule}' runs one stage on a rank, but "
                f"stages_per_rank={self.stages_per_rank}. Set stages_per_rank to 1, or use "
                "schedule='interleaved_1f1b'."
            )
        if schedule.fills_stages and steps < self.num_stages:
            raise UserError(
                f"gradient_accumulation_steps={steps} is too few for schedule='{self.schedule}' "
                f"on {self.num_stages} stages: it needs a micro-batch for each. Set it to "
                f"{self.num_stages} or more, or use schedule='gpipe'."
            )
        rounds = max(1, steps // self.ranks_per_replica)
        if schedule.in_rounds and steps % rounds:
            ranks = self.ranks_per_replica
            raise UserError(
                f"gradient_accumulation_steps={steps} does not part into {rounds} equal rounds, "
                f"which schedule='{self.schedule}' runs on {ranks} ranks. Set it to a multiple of "
                f"{ranks}, e.g. {(steps // ranks + 1) * ranks}."
            )


def _check_layers(layers_per_stage: List[int]) -> None:
    numbers = list(layers_per_stage)
    if not numbers or any(not _is_int(n) or n < -1 for n in numbers):
        raise UserError(
            f"layers_per_stage={numbers} must be a list of numbers of layers, one for each stage; "
            "-1 takes an equal share of the rest. E.g. [3, 7, 7, 7] or [-1, -1]."
        )


def _check_positive(name: str, value: Any) -> None:
    if not _is_int(value) or value < 1:
        raise UserError(f"{name}={value!r} must be a whole number of at least 1.")


def _check_schedule_name(name: str) -> None:
    if name not in SCHEDULES:
        close = get_close_matches(str(name), SCHEDULES, n=1, cutoff=0.0)[0]
        raise UserError(
            f"schedule={name!r} is unknown. Did you mean '{close}'? There are "
            f"{', '.join(SCHEDULES)}."
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
