"""One of the two programs that PopTorch compiles, and what its compiler demands of it.

Source:
    popart_compiler/source/Compiler.cpp and CompilerImpl.cpp of PopTorch 3.4 (numbers of stages,
    device iterations, IPUs); Options.setAvailableMemoryProportion (proportions).
"""

from __future__ import annotations

from typing import Iterator, List, NamedTuple, Union

from lightning_ipu_bert.pipeline.plan import PipelineShape
from lightning_ipu_bert.pipeline.rules import Violation, proportions_rule
from lightning_ipu_bert.pipeline.schedules import SCHEDULES

MOST_IPUS = 64
"""IPUs of one process."""


class ProgramConfig(NamedTuple):
    """What is compiled: training and inference are two programs, with a pipeline each."""

    training: bool
    shape: PipelineShape
    matmul_proportion: List[float]
    """Share of each IPU's memory for the temporary data of matrix products."""
    embedding_serialization_factor: int
    pipelined: bool
    """Whether stages run side by side; else one after the other (sharded)."""

    @property
    def prefix(self) -> str:
        """Beginning of the names of this program's fields."""
        return "" if self.training else "inference_"


def per_ipu(proportion: Union[float, List[float]], ipus: int) -> List[float]:
    """Return a proportion for every IPU."""
    return list(proportion) if isinstance(proportion, (list, tuple)) else [proportion] * ipus


def proportion_rules(program: ProgramConfig) -> Iterator[Violation]:
    """There is a proportion for each IPU, and each is in (0, 1]."""
    field, values = f"{program.prefix}matmul_proportion", program.matmul_proportion
    if len(values) != program.shape.num_stages:
        yield Violation(
            field,
            values,
            f"has {len(values)} entries for {program.shape.num_stages} IPUs",
            "Give one number for all, or one for each IPU.",
        )
    yield from proportions_rule(field, values)


def rank_only_rules(stages_per_rank: int, schedule: str) -> Iterator[Violation]:
    """What only ranks can have is not asked for."""
    if stages_per_rank != 1:
        yield Violation(
            "stages_per_rank",
            stages_per_rank,
            "is not possible on IPUs: each holds one stage",
            "Set it to 1, or leave it out.",
        )
    possible = [name for name, known in SCHEDULES.items() if known.on_ipus]
    if schedule not in possible:
        yield Violation(
            "schedule",
            schedule,
            f"is not possible on IPUs: PopTorch runs its own, which is {', '.join(possible)}",
            "Leave it out.",
        )


def program_rules(program: ProgramConfig, auto_round_num_ipus: bool = False) -> Iterator[Violation]:
    """What PopTorch would only find while it compiles.

    Args:
        program: Training or inference.
        auto_round_num_ipus: Whether more IPUs may be taken than are used.
    """
    stages, steps = program.shape.num_stages, program.shape.batches.gradient_accumulation_steps
    if program.training and steps < 2 * stages - 1:
        yield Violation(
            "gradient_accumulation_steps",
            steps,
            f"cannot fill the {2 * stages - 1} training stages (forwards and backwards) of "
            f"{stages} IPUs",
            f"Set it to {2 * stages - 1} or more, or use fewer IPUs.",
        )
    iterations = program.shape.batches.device_iterations
    if not program.training and program.pipelined and iterations < stages:
        yield Violation(
            "inference_device_iterations",
            iterations,
            f"cannot fill the {stages} stages of inference",
            f"Set it to {stages} or more, use fewer IPUs by inference_layers_per_ipu, or set "
            "sharded_execution_for_inference.",
        )
    yield from _ipu_rules(program, auto_round_num_ipus)


def _ipu_rules(program: ProgramConfig, auto_round_num_ipus: bool) -> Iterator[Violation]:
    ipus, stages = program.shape.num_devices, program.shape.num_stages
    field, value = f"{program.prefix}replication_factor", program.shape.batches.replication_factor
    if ipus > MOST_IPUS:
        yield Violation(
            field,
            value,
            f"x {stages} stages are {ipus} IPUs, and a process can use {MOST_IPUS}",
            "Use fewer replicas, or several processes by poprun.",
        )
    if ipus & (ipus - 1) and not auto_round_num_ipus:
        yield Violation(
            field,
            value,
            f"x {stages} stages are {ipus} IPUs, and they come in powers of two",
            "Change the stages or replicas, or set auto_round_num_ipus to take "
            f"{1 << ipus.bit_length()} and leave some idle.",
        )


def enough_data_rule(
    examples: int, micro_batch_size: int, program: ProgramConfig
) -> Iterator[Violation]:
    """Training data fill at least one call; such a loader would be empty else."""
    batches = program.shape.batches
    needed = batches.host_batch_size(micro_batch_size)
    if examples < needed:
        yield Violation(
            "The training data",
            None,
            f"has {examples} examples, and one call of the IPUs takes {needed} "
            f"({micro_batch_size} x gradient_accumulation_steps="
            f"{batches.gradient_accumulation_steps} x replication_factor="
            f"{batches.replication_factor} x device_iterations={batches.device_iterations})",
            "Lower one of them, or give more data.",
        )


def serialization_rule(rows: int, factor: int) -> Iterator[Violation]:
    """An embedding table is divisible into equal parts."""
    if rows % factor:
        possible = [str(f) for f in range(2, 33) if rows % f == 0]
        yield Violation(
            "embedding_serialization_factor",
            factor,
            f"does not divide the {rows} rows of the embedding table",
            f"Use {' or '.join(['1', *possible])}.",
        )
