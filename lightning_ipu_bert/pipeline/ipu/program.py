"""The two programs that PopTorch compiles, and the rules of its compiler.

Source:
    popart_compiler/source/Compiler.cpp and CompilerImpl.cpp of PopTorch 3.4 (numbers of stages,
    device iterations, IPUs); Options.setAvailableMemoryProportion (proportions).
"""

from __future__ import annotations

from typing import Iterator, List, NamedTuple, Union

from lightning_ipu_bert.pipeline.plan import PipelineShape
from lightning_ipu_bert.pipeline.rules import Violation, proportions_rule
from lightning_ipu_bert.pipeline.schedules import SCHEDULES

MAX_IPUS = 64
"""Maximum number of IPUs of one process."""


class ProgramConfig(NamedTuple):
    """Configuration of a program; training and inference have one each."""

    training: bool
    shape: PipelineShape
    matmul_proportion: List[float]
    """Fraction of the memory of each IPU for temporary data of matrix multiplications."""
    embedding_serialization_factor: int
    pipelined: bool
    """Whether stages run in parallel; otherwise sequentially (sharded)."""

    @property
    def prefix(self) -> str:
        """Prefix of the names of the fields of this program."""
        return "" if self.training else "inference_"


def per_ipu(proportion: Union[float, List[float]], ipus: int) -> List[float]:
    """Return one proportion per IPU."""
    return list(proportion) if isinstance(proportion, (list, tuple)) else [proportion] * ipus


def proportion_rules(program: ProgramConfig) -> Iterator[Violation]:
    """There must be one proportion per IPU, each in (0, 1]."""
    field, values = f"{program.prefix}matmul_proportion", program.matmul_proportion
    if len(values) != program.shape.num_stages:
        yield Violation(
            field,
            values,
            f"has {len(values)} entries for {program.shape.num_stages} IPUs",
            "Set one value for all IPUs, or one per IPU.",
        )
    yield from proportions_rule(field, values)


def rank_only_rules(stages_per_rank: int, schedule: str) -> Iterator[Violation]:
    """Options of `PipelineParallelStrategy` that IPUs do not support must have their defaults."""
    if stages_per_rank != 1:
        yield Violation(
            "stages_per_rank",
            stages_per_rank,
            "is not supported on IPUs: each IPU holds one stage",
            "Set it to 1, or remove it.",
        )
    supported = [name for name, known in SCHEDULES.items() if known.on_ipus]
    if schedule not in supported:
        yield Violation(
            "schedule",
            schedule,
            f"is not supported on IPUs: PopTorch runs {', '.join(supported)}",
            "Remove it.",
        )


def program_rules(program: ProgramConfig, auto_round_num_ipus: bool = False) -> Iterator[Violation]:
    """Rules that PopTorch checks only while it compiles.

    Args:
        program: Training or inference.
        auto_round_num_ipus: Whether to reserve more IPUs than the program uses.
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


def ipu_limit_rule(program: ProgramConfig) -> Iterator[Violation]:
    """A process can use a limited number of IPUs."""
    ipus, stages = program.shape.num_devices, program.shape.num_stages
    field, value = f"{program.prefix}replication_factor", program.shape.batches.replication_factor
    if ipus > MAX_IPUS:
        yield Violation(
            field,
            value,
            f"x {stages} stages is {ipus} IPUs, but a process can use at most {MAX_IPUS}",
            "Use fewer replicas, or start several processes with poprun.",
        )


def _ipu_rules(program: ProgramConfig, auto_round_num_ipus: bool) -> Iterator[Violation]:
    yield from ipu_limit_rule(program)
    ipus, stages = program.shape.num_devices, program.shape.num_stages
    field, value = f"{program.prefix}replication_factor", program.shape.batches.replication_factor
    if ipus & (ipus - 1) and not auto_round_num_ipus:
        yield Violation(
            field,
            value,
            f"x {stages} stages is {ipus} IPUs, which must be a power of two",
            "Change the number of stages or replicas, or set auto_round_num_ipus to reserve "
            f"{1 << ipus.bit_length()} IPUs.",
        )


def enough_data_rule(
    examples: int, micro_batch_size: int, program: ProgramConfig
) -> Iterator[Violation]:
    """The training data must fill at least one call, or the loader would be empty."""
    batches = program.shape.batches
    needed = batches.host_batch_size(micro_batch_size)
    if examples < needed:
        yield Violation(
            "The training data",
            None,
            f"has {examples} examples, but one call of the IPUs needs {needed} "
            f"({micro_batch_size} x gradient_accumulation_steps="
            f"{batches.gradient_accumulation_steps} x replication_factor="
            f"{batches.replication_factor} x device_iterations={batches.device_iterations})",
            "Lower one of them, or use more data.",
        )


def serialization_rule(rows: int, factor: int) -> Iterator[Violation]:
    """An embedding table must be divisible into equal parts."""
    if rows % factor:
        divisors = [str(f) for f in range(2, 33) if rows % f == 0]
        yield Violation(
            "embedding_serialization_factor",
            factor,
            f"does not divide the {rows} rows of the embedding table",
            f"Use {' or '.join(['1', *divisors])}.",
        )
