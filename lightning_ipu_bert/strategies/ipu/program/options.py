"""`ipu_options`: `poptorch.Options` of an `IPUConfig`."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch

from lightning_ipu_bert._compat.poptorch import popart_options
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig
from lightning_ipu_bert.pipeline.ipu.program import ProgramConfig
from lightning_ipu_bert.strategies.ipu.sdk import import_popdist, import_poptorch

OVERLAP_MEMORY_OPTIMIZED = 3
"""popart.AccumulateOuterFragmentSchedule; PopTorch accepts the number."""
JUST_IN_TIME = 1
"""popart.SubgraphCopyingStrategy."""


class OptionsContext(NamedTuple):
    """Inputs of the options that are not in the configuration."""

    seed: Optional[int] = None
    """Seed of the random numbers of the IPUs if the configuration has none."""
    initializers_file: Optional[str] = None
    """File for initial weights: the format of PopART is limited to 2 GB."""
    offline: bool = False
    """Compile without IPUs."""
    auto_round_num_ipus: bool = False
    """Round the number of reserved IPUs up to a power of two."""
    returns_output: bool = False
    """Return the output of every micro-batch, also in training."""


def ipu_options(
    config: IPUConfig, training: bool, context: Optional[OptionsContext] = None
) -> object:
    """Return the options of one program.

    Args:
        config: The configuration.
        training: Whether to return the options of the training program.
        context: Inputs that are not in the configuration.

    Returns:
        `poptorch.Options`, not frozen yet.

    Source:
        IPUConfig._to_options of optimum-graphcore, and get_options of Graphcore's BERT; inference
        is pipelined unless the config says otherwise.
    """
    poptorch = import_poptorch()
    program = config.training if training else config.inference
    batches = program.shape.batches
    context = context or OptionsContext()
    options = _new_options(poptorch, program)
    options.autoRoundNumIPUs(context.auto_round_num_ipus)
    options.deviceIterations(batches.device_iterations)
    if training:
        options.Training.gradientAccumulation(batches.gradient_accumulation_steps)
        options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
        if config.auto_loss_scaling:
            options.Training.setAutomaticLossScaling(True)
    sums = training and not context.returns_output
    mode = config.output_mode.capitalize() if sums else "All"
    options.outputMode(poptorch.OutputMode[mode])
    seed = context.seed if config.seed is None else config.seed
    if seed is not None:
        with torch.random.fork_rng(devices=[]):  # PopTorch also seeds the generator of the host
            options.randomSeed(seed)
    _place(poptorch, options, config, program)
    if context.offline:
        options.useOfflineIpuTarget()
    if config.executable_cache_dir and config.executable_cache_dir != "disabled":
        options.enableExecutableCaching(config.executable_cache_dir)
    options.Precision.enableStochasticRounding(training)
    if config.enable_half_partials:
        options.Precision.setPartialsType(torch.float16)
    _tune_popart(popart_options(options), config, training, context)
    return options


def _new_options(poptorch: Any, program: ProgramConfig) -> Any:
    """Return empty options; PopDist sets the replicas of this process."""
    popdist = import_popdist()
    if popdist is None:
        return poptorch.Options().replicationFactor(program.shape.batches.replication_factor)
    from popdist.poptorch import Options  # type: ignore[import-not-found]

    return Options(ipus_per_replica=program.shape.num_stages)


def _place(poptorch: Any, options: Any, config: IPUConfig, program: ProgramConfig) -> None:
    """Set the location of the optimizer state, and how stages are executed."""
    shards = config.replicated_tensor_sharding and options.replication_factor > 1
    options.TensorLocations.setOptimizerLocation(
        poptorch.TensorLocationSettings()
        .useOnChipStorage(not config.optimizer_state_offchip)
        .useReplicatedTensorSharding(shards)
    )
    execution = poptorch.PipelinedExecution if program.pipelined else poptorch.ShardedExecution
    options.setExecutionStrategy(execution(poptorch.AutoStage.AutoIncrement))
    options.setAvailableMemoryProportion(
        {f"IPU{ipu}": share for ipu, share in enumerate(program.matmul_proportion)}
    )


def _tune_popart(popart: Any, config: IPUConfig, training: bool, context: OptionsContext) -> None:
    """Set the options of PopART that all BERT models of Graphcore set."""
    if context.initializers_file:
        popart.set("saveInitializersToFile", context.initializers_file)
    if config.decompose_grad_sum:
        popart.set("decomposeGradSum", True)
    # Do not stream accumulated gradients to the host.
    popart.set("disableGradAccumulationTensorStreams", True)
    # IPUs update their weights in parallel, except for IPU 0, which holds the embeddings.
    popart.set("accumulateOuterFragmentSettings.schedule", OVERLAP_MEMORY_OPTIMIZED)
    popart.set("accumulateOuterFragmentSettings.excludedVirtualGraphs", ["0"])
    popart.set("outlineThreshold", 10.0)
    popart.set("subgraphCopyingStrategy", JUST_IN_TIME)
    popart.set("scheduleNonWeightUpdateGradientConsumersEarly", True)
    popart.setPatterns(
        {"TiedGather": True, "TiedGatherAccumulate": True, "UpdateInplacePrioritiesForIpu": True}
    )
    if config.explicit_ir_inference and not training:
        popart.set("enableExplicitIR", True)
    engine = {"opt.useAutoloader": "true", "target.syncReplicasIndependently": "true"}
    popart.set("engineOptions", engine)
