"""`IPUConfig`: configuration of IPUs, with the field names of Graphcore's `ipu_config.json`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Dict, Iterator, List, Mapping, Optional, Tuple, Union

from lightning_ipu_bert.pipeline.batches import BatchAlgebra
from lightning_ipu_bert.pipeline.ipu.fields import (
    COUNTS,
    NOT_SUPPORTED,
    OLD_FIELDS,
    OPTIONAL_COUNTS,
    OUTPUT_MODES,
    PLAN_FIELDS,
    SPELLINGS,
    select,
)
from lightning_ipu_bert.pipeline.ipu.program import ProgramConfig, per_ipu, proportion_rules
from lightning_ipu_bert.pipeline.plan import PipelineShape
from lightning_ipu_bert.pipeline.rules import (
    Violation,
    choice_rule,
    count_rule,
    enforce,
    layers_rule,
)

DEFAULT_PROPORTION = 0.2
"""For an inference pipeline with another number of IPUs than training, as in optimum-graphcore."""


@dataclass(frozen=True)
class IPUConfig:
    """How a model runs on IPUs, with the field names of Graphcore's `ipu_config.json`.

    Values are not checked on creation; `value_rules` yields violations.

    Source:
        IPUConfig of optimum-graphcore 0.3.1 and 0.7.1; PopTorch user guide 3.4, sections 4 and 5.
    """

    layers_per_ipu: List[int] = field(default_factory=lambda: [-1])
    """Number of layers on each IPU of a replica, e.g. [3, 7, 7, 7]; IPUs with -1 share the
    remaining layers equally. Blocks before the layers are placed on the first IPU, blocks after
    them on the last."""
    replication_factor: int = 1
    """Number of copies of the training pipeline; each processes its own shard of the data."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of a replica per weight update."""
    recompute_checkpoint_every_layer: bool = False
    """Store only the outputs of layers and recompute their activations in the backward pass."""
    replicated_tensor_sharding: bool = False
    """Shard the optimizer state over the replicas (RTS, ZeRO stage 1)."""
    optimizer_state_offchip: bool = False
    """Store the optimizer state in Streaming Memory."""
    ipus_per_replica: Optional[int] = None
    """IPUs of a replica; must equal the number of entries of layers_per_ipu. With layers_per_ipu
    [-1] the layers are divided among this many IPUs."""
    device_iterations: int = 1
    """Weight updates per call from the host."""
    matmul_proportion: Union[float, List[float]] = 0.2
    """Fraction of the memory of an IPU for temporary data of matrix multiplications: one value, or
    one per IPU."""
    inference_layers_per_ipu: Optional[List[int]] = None
    """layers_per_ipu for evaluation and prediction; null uses layers_per_ipu."""
    inference_replication_factor: int = 1
    """Number of copies of the inference pipeline."""
    inference_ipus_per_replica: Optional[int] = None
    """ipus_per_replica for evaluation and prediction."""
    inference_device_iterations: int = 1
    """Micro-batches of a replica per inference call; at least the number of stages if inference is
    pipelined."""
    inference_matmul_proportion: Union[float, List[float], None] = None
    """matmul_proportion for evaluation and prediction."""
    sharded_execution_for_inference: bool = False
    """Run the stages of inference sequentially instead of pipelined."""
    embedding_serialization_factor: Optional[int] = None
    """Number of parts in which the largest embedding table is read, to save memory; null is 1."""
    inference_embedding_serialization_factor: Optional[int] = None
    """embedding_serialization_factor for evaluation and prediction; null uses the same."""
    enable_half_partials: bool = True
    """Store partial sums of matrix multiplications as float16."""
    enable_half_first_order_momentum: bool = False
    """Store the first moments of the optimizer as float16."""
    output_mode: str = "sum"
    """Losses returned by a call: sum (over all micro-batches; their mean is logged), all (one per
    micro-batch), final (of the last micro-batch) or default (the default of PopTorch: final)."""
    auto_loss_scaling: bool = False
    """Let PopTorch choose the loss scaling (experimental)."""
    seed: Optional[int] = None
    """Seed of the random numbers of the IPUs; null uses the seed of the run."""
    executable_cache_dir: str = ""
    """Folder in which compiled programs are cached between runs; empty disables the cache."""
    profile_dir: str = ""
    """Folder for a PopVision profile of the run; empty disables profiling."""
    decompose_grad_sum: bool = False
    """Sum partial gradients as a tree of additions."""
    explicit_ir_inference: bool = False
    """Compile inference with the explicit intermediate representation of PopART."""
    projection_serialization_factor: Optional[int] = None
    """Not used: serialization of the output layer of a language model."""
    inference_projection_serialization_factor: Optional[int] = None
    """Not used: the same for inference."""
    serialized_projection_splits_per_ipu: Optional[List[int]] = None
    """Not used: placement of the serialized output layer of a language model."""
    inference_serialized_projection_splits_per_ipu: Optional[List[int]] = None
    """Not used: the same for inference."""
    serialized_embedding_splits_per_ipu: Optional[List[int]] = None
    """Not supported: placement of the serialized embedding table."""
    inference_serialized_embedding_splits_per_ipu: Optional[List[int]] = None
    """Not supported: the same for inference."""
    parallelize_kwargs: Dict[str, object] = field(default_factory=dict)
    """Not used: arguments of `parallelize` in optimum-graphcore."""
    inference_parallelize_kwargs: Dict[str, object] = field(default_factory=dict)
    """Not used: the same for inference."""
    use_popdist: bool = False
    """Not used: PopDist is detected automatically."""
    execute_encoder_on_cpu_for_generation: bool = False
    """Not supported (nor is it by optimum-graphcore)."""

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, object],
        pod_type: Optional[str] = None,
        overrides: Optional[Mapping[str, object]] = None,
    ) -> IPUConfig:
        """Create a configuration from the content of an `ipu_config.json` of either generation.

        Args:
            values: Fields of Graphcore or of `PipelineConfig`. A value may be a dictionary by pod
                type, e.g. {pod4: 1, pod16: 4, default: 1}.
            pod_type: Selects from such dictionaries.
            overrides: Values that override `values`; None does not override.

        Raises:
            UserError: If a field is unknown or a value is invalid.
        """
        given = select(values, [f.name for f in fields(cls)], pod_type)
        new = {SPELLINGS.get(k, k): v for k, v in (overrides or {}).items() if v is not None}
        if "layers_per_ipu" in new:
            given.pop("ipus_per_replica", None)  # it belongs to the overridden layers
        config = cls(**{**given, **new})
        enforce(config.value_rules())
        return config

    def to_dict(self) -> Dict[str, object]:
        """Return the fields of the newest generation, and older fields only if they are set.

        optimum-graphcore 0.7 rejects older fields; without them it can read the file.
        """
        defaults = vars(IPUConfig())
        return {
            name: value
            for name, value in vars(self).items()
            if name not in OLD_FIELDS or value != defaults[name]
        }

    def plan_fields(self) -> Dict[str, object]:
        """Return the fields that all pipelines have, by their names in `PipelineConfig`."""
        values = {name: vars(self)[SPELLINGS.get(name, name)] for name in PLAN_FIELDS}
        layers = self.training.shape.layers_per_stage
        return {**values, "layers_per_stage": list(layers)}

    @property
    def training(self) -> ProgramConfig:
        """The training program."""
        layers = _layers(self.layers_per_ipu, self.ipus_per_replica)
        batches = BatchAlgebra(
            self.gradient_accumulation_steps, self.replication_factor, self.device_iterations
        )
        return ProgramConfig(
            training=True,
            shape=PipelineShape(layers, batches),
            matmul_proportion=per_ipu(self.matmul_proportion, len(layers)),
            embedding_serialization_factor=self.embedding_serialization_factor or 1,
            pipelined=True,
        )

    @property
    def inference(self) -> ProgramConfig:
        """The inference program, for evaluation and prediction."""
        own = self.inference_layers_per_ipu is not None
        ipus = self.inference_ipus_per_replica or (None if own else self.ipus_per_replica)
        layers = _layers(self.inference_layers_per_ipu or self.layers_per_ipu, ipus)
        proportion = self.inference_matmul_proportion
        if proportion is None:
            proportion = self.matmul_proportion
            if isinstance(proportion, list) and len(proportion) != len(layers):
                proportion = DEFAULT_PROPORTION
        factor = self.inference_embedding_serialization_factor
        batches = BatchAlgebra(
            1, self.inference_replication_factor, self.inference_device_iterations
        )
        return ProgramConfig(
            training=False,
            shape=PipelineShape(layers, batches),
            matmul_proportion=per_ipu(proportion, len(layers)),
            embedding_serialization_factor=factor or self.embedding_serialization_factor or 1,
            pipelined=not self.sharded_execution_for_inference,
        )

    def value_rules(self) -> Iterator[Violation]:
        """Rules for single values and for the values of a program."""
        violations = list(self._field_rules())
        yield from violations
        if not violations:  # programs are made of valid fields only
            for program in (self.training, self.inference):
                yield from proportion_rules(program)

    def _field_rules(self) -> Iterator[Violation]:
        values = vars(self)
        for name in COUNTS:
            yield from count_rule(name, values[name])
        for name in OPTIONAL_COUNTS:
            if values[name] is not None:
                yield from count_rule(name, values[name])
        for name, fix in NOT_SUPPORTED.items():
            if values[name]:
                yield Violation(name, values[name], "is not supported", fix)
        yield from choice_rule("output_mode", self.output_mode, OUTPUT_MODES)
        yield from _layers_rule("layers_per_ipu", self.layers_per_ipu, self.ipus_per_replica)
        if self.inference_layers_per_ipu is not None:
            name, ipus = "inference_layers_per_ipu", self.inference_ipus_per_replica
            yield from _layers_rule(name, self.inference_layers_per_ipu, ipus)


def _layers_rule(field: str, layers: List[int], ipus: Optional[int]) -> Iterator[Violation]:
    yield from layers_rule(field, layers, "IPU")
    if isinstance(layers, list) and ipus not in (None, 1, len(layers)) and layers != [-1]:
        yield Violation(
            field,
            layers,
            f"has {len(layers)} entries for {ipus} IPUs per replica",
            "Use one entry per IPU, or remove ipus_per_replica.",
        )


def _layers(layers: List[int], ipus: Optional[int]) -> Tuple[int, ...]:
    """Return an entry for every IPU: [-1] divides the layers equally; one IPU holds all layers."""
    if ipus == 1:
        return (-1,)
    return tuple(layers) * (ipus or 1) if list(layers) == [-1] else tuple(layers)
