"""The rules of PopTorch and the IPU, checked before minutes of compiling are spent on breaking one.

Source:
    popart_compiler/source/Compiler.cpp and CompilerImpl.cpp of PopTorch 3.4 (numbers of stages,
    device iterations, IPUs); Options.setAvailableMemoryProportion (proportions).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, List, Mapping, Optional

from lightning_ipu_bert.errors import UserError

if TYPE_CHECKING:
    from lightning_ipu_bert.pipeline.ipu_config import Graph, IPUConfig

OUTPUT_MODES = ("sum", "all", "final", "default")
CHECKPOINT_KEY = "ipu"
"""Under which a checkpoint of IPUs has their config and their random state."""
MOST_IPUS = 64
"""IPUs of one process."""
COUNTS = (
    "replication_factor",
    "inference_replication_factor",
    "gradient_accumulation_steps",
    "device_iterations",
    "inference_device_iterations",
)
OPTIONAL_COUNTS = (
    "ipus_per_replica",
    "inference_ipus_per_replica",
    "embedding_serialization_factor",
    "inference_embedding_serialization_factor",
)
NOT_SUPPORTED = {
    "serialized_embedding_splits_per_ipu": "Use embedding_serialization_factor.",
    "inference_serialized_embedding_splits_per_ipu": "Use embedding_serialization_factor.",
    "execute_encoder_on_cpu_for_generation": "Leave it out.",
}


def check_config(config: IPUConfig) -> None:
    """Check single values and those that belong together.

    Raises:
        UserError: If one breaks a rule.
    """
    for name in COUNTS:
        _check_count(name, getattr(config, name))
    for name in OPTIONAL_COUNTS:
        if getattr(config, name) is not None:
            _check_count(name, getattr(config, name))
    for name, way_out in NOT_SUPPORTED.items():
        if getattr(config, name):
            raise UserError(f"{name}={getattr(config, name)!r} is not supported. {way_out}")
    if config.output_mode not in OUTPUT_MODES:
        raise UserError(
            f"output_mode={config.output_mode!r} is unknown. Use one of {', '.join(OUTPUT_MODES)}."
        )
    _check_layers("layers_per_ipu", config.layers_per_ipu, config.ipus_per_replica)
    if config.inference_layers_per_ipu is not None:
        name, ipus = "inference_layers_per_ipu", config.inference_ipus_per_replica
        _check_layers(name, config.inference_layers_per_ipu, ipus)
    for graph in (config.training, config.inference):
        _check_proportions(graph)


def check_graph(graph: Graph, auto_round_num_ipus: bool = False) -> None:
    """Check what PopTorch would only find while it compiles.

    Args:
        graph: Training or inference.
        auto_round_num_ipus: Whether more IPUs may be taken than are used.

    Raises:
        UserError: If the pipeline cannot be compiled.
    """
    stages, steps = graph.num_stages, graph.gradient_accumulation_steps
    if graph.training and steps < 2 * stages - 1:
        raise UserError(
            f"gradient_accumulation_steps={steps} cannot fill the {2 * stages - 1} training stages "
            f"(forwards and backwards) of {stages} IPUs. Set it to {2 * stages - 1} or more, or "
            "use fewer IPUs."
        )
    if not graph.training and graph.pipelined and graph.device_iterations < stages:
        raise UserError(
            f"inference_device_iterations={graph.device_iterations} cannot fill the {stages} "
            f"stages of inference. Set it to {stages} or more, use fewer IPUs by "
            "inference_layers_per_ipu, or set sharded_execution_for_inference."
        )
    ipus, prefix = graph.num_ipus, "" if graph.training else "inference_"
    if ipus > MOST_IPUS:
        raise UserError(
            f"{stages} stages x {prefix}replication_factor={graph.replication_factor} are {ipus} "
            f"IPUs, and a process can use {MOST_IPUS}. Use fewer replicas, or several processes "
            "by poprun."
        )
    if ipus & (ipus - 1) and not auto_round_num_ipus:
        raise UserError(
            f"{stages} stages x {prefix}replication_factor={graph.replication_factor} are {ipus} "
            "IPUs, and they come in powers of two. Change the stages or replicas, or set "
            f"auto_round_num_ipus to take {1 << ipus.bit_length()} and leave some idle."
        )


def check_enough_data(examples: int, micro_batch_size: int, graph: Graph) -> None:
    """Check that training data fill one call.

    Raises:
        UserError: If they do not: such a loader would be empty.
    """
    needed = micro_batch_size * graph.micro_batches_per_call
    if examples < needed:
        raise UserError(
            f"The training data have {examples} examples, and one call of the IPUs takes {needed} "
            f"({micro_batch_size} x gradient_accumulation_steps="
            f"{graph.gradient_accumulation_steps} x replication_factor="
            f"{graph.replication_factor} x device_iterations={graph.device_iterations}). "
            "Lower one of them, or give more data."
        )


def check_progress(checkpoint: Mapping[str, Any], iterations: int) -> None:
    """Check that a run that goes on counts batches and updates as before.

    Args:
        checkpoint: Lightning's, of any strategy.
        iterations: Updates of a batch from now on: `device_iterations` on IPUs, else 1.

    Raises:
        UserError: If a batch in the middle of an epoch has become another number of updates, or the
            updates so far are no whole number of batches, so that no interval would ever be hit.
    """
    updates = checkpoint.get("global_step", 0)
    if updates % iterations:
        raise UserError(
            f"The checkpoint has made {updates} updates, which device_iterations={iterations} does "
            "not divide: no interval would be hit. Use one that divides it, e.g. 1."
        )
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    batches = loops.get("epoch_loop.batch_progress", {})
    middle = batches.get("current", {}).get("ready", 0) and not batches.get("is_last_batch")
    config = checkpoint.get(CHECKPOINT_KEY, {}).get("config", {})
    saved = config.get("device_iterations", 1)
    if middle and saved != iterations:
        raise UserError(
            f"The checkpoint was saved in the middle of an epoch with device_iterations={saved}, "
            f"and now a batch is {iterations} updates: batches cannot be counted on. Go on with "
            f"device_iterations={saved}, or from a checkpoint of the end of an epoch."
        )


def check_serialization(rows: int, factor: int) -> None:
    """Check that an embedding table parts into equal pieces.

    Raises:
        UserError: If it does not.
    """
    if rows % factor:
        possible = [str(f) for f in range(2, 33) if rows % f == 0]
        raise UserError(
            f"embedding_serialization_factor={factor} does not divide the {rows} rows of the "
            f"embedding table. Use {' or '.join(['1', *possible])}."
        )


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}={value!r} must be a whole number of at least 1.")


def _check_layers(name: str, layers: List[int], ipus: Optional[int]) -> None:
    numbers = list(layers)
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < -1 for n in numbers):
        raise UserError(
            f"{name}={numbers} must be a list of numbers of layers, one for each IPU; -1 takes an "
            "equal share of the rest. E.g. [3, 7, 7, 7] or [-1, -1]."
        )
    if ipus not in (None, 1, len(numbers)) and numbers != [-1]:
        raise UserError(
            f"{name}={numbers} has {len(numbers)} entries for {ipus} IPUs per replica. "
            "Give one for each, or leave ipus_per_replica out."
        )


def _check_proportions(graph: Graph) -> None:
    name = "matmul_proportion" if graph.training else "inference_matmul_proportion"
    values = graph.matmul_proportion
    if len(values) != graph.num_stages:
        raise UserError(
            f"{name}={values} has {len(values)} entries for {graph.num_stages} IPUs. Give one "
            "number for all, or one for each IPU."
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise UserError(f"{name}={values}: {value!r} is no share. Use numbers in (0, 1].")
