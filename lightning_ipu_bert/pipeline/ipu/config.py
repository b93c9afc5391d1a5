"""`IPUConfig`: how a model runs on IPUs, in the words of Graphcore's `ipu_config.json`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union

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
"""Of an inference pipeline that training's list does not fit, as in optimum-graphcore."""


@dataclass(frozen=True)
class IPUConfig:
    """How a model runs on IPUs. The names are those of Graphcore's `ipu_config.json`.

    A record of what was written; `value_rules` yields what is wrong with it.

    Source:
        IPUConfig of optimum-graphcore 0.3.1 and 0.7.1; PopTorch user guide 3.4, sections 4 and 5.
    """

    layers_per_ipu: List[int] = field(default_factory=lambda: [-1])
    """Numbered layers on each IPU of a replica, e.g. [3, 7, 7, 7]; -1 takes an equal share of the
    rest. Blocks before the layers are placed on the first IPU, blocks after them on the last."""
    replication_factor: int = 1
    """Copies of the pipeline that train, each with its own part of the data."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of a replica between two weight updates."""
    recompute_checkpoint_every_layer: bool = False
    """Keep only the outputs of layers and compute their insides again in the backward."""
    replicated_tensor_sharding: bool = False
    """Split the optimizer's state over the replicas (RTS, ZeRO stage 1)."""
    optimizer_state_offchip: bool = False
    """Keep the optimizer's state in the memory beside the IPUs."""
    ipus_per_replica: Optional[int] = None
    """IPUs of a replica; as many as layers_per_ipu has entries. With layers_per_ipu [-1] the layers
    are shared by this many IPUs."""
    device_iterations: int = 1
    """Weight updates of one call from the host."""
    matmul_proportion: Union[float, List[float]] = 0.2
    """Share of each IPU's memory for the temporary data of matrix products: one, or one per IPU."""
    inference_layers_per_ipu: Optional[List[int]] = None
    """As layers_per_ipu, for evaluation and prediction; layers_per_ipu where null."""
    inference_replication_factor: int = 1
    """Copies of the pipeline that evaluate and predict."""
    inference_ipus_per_replica: Optional[int] = None
    """As ipus_per_replica, for evaluation and prediction."""
    inference_device_iterations: int = 1
    """Micro-batches of a replica in one call that evaluates; at least the number of stages where
    inference is pipelined."""
    inference_matmul_proportion: Union[float, List[float], None] = None
    """As matmul_proportion, for evaluation and prediction."""
    sharded_execution_for_inference: bool = False
    """Let stages evaluate one after the other instead of side by side."""
    embedding_serialization_factor: Optional[int] = None
    """Parts in which the large embedding table is read, to save memory; 1 where null."""
    inference_embedding_serialization_factor: Optional[int] = None
    """As embedding_serialization_factor, for evaluation and prediction; the same where null."""
    enable_half_partials: bool = True
    """Keep the partial sums of matrix products as float16."""
    enable_half_first_order_momentum: bool = False
    """Keep the optimizer's first moments as float16."""
    output_mode: str = "sum"
    """Which losses of a call come back: sum (of all its micro-batches: the loss that is logged is
    their mean), all (the same, one by one), final (only the last micro-batch's) or default
    (PopTorch's own: final)."""
    auto_loss_scaling: bool = False
    """Let PopTorch choose the loss scaling (experimental)."""
    seed: Optional[int] = None
    """Of the IPUs' random numbers; the run's own where null."""
    executable_cache_dir: str = ""
    """Folder in which compiled programs are kept for the next run; none where empty."""
    profile_dir: str = ""
    """Folder for PopVision's profile of the run; none where empty."""
    decompose_grad_sum: bool = False
    """Add partial gradients up as a tree of additions."""
    explicit_ir_inference: bool = False
    """Compile inference by PopART's explicit intermediate representation."""
    projection_serialization_factor: Optional[int] = None
    """Not used: parts of a language model's output layer."""
    inference_projection_serialization_factor: Optional[int] = None
    """Not used: the same for inference."""
    serialized_projection_splits_per_ipu: Optional[List[int]] = None
    """Not used: places of the parts of a language model's output layer."""
    inference_serialized_projection_splits_per_ipu: Optional[List[int]] = None
    """Not used: the same for inference."""
    serialized_embedding_splits_per_ipu: Optional[List[int]] = None
    """Not supported: places of the parts of the embedding table."""
    inference_serialized_embedding_splits_per_ipu: Optional[List[int]] = None
    """Not supported: the same for inference."""
    parallelize_kwargs: Dict[str, Any] = field(default_factory=dict)
    """Not used: arguments of optimum-graphcore's `parallelize`."""
    inference_parallelize_kwargs: Dict[str, Any] = field(default_factory=dict)
    """Not used: the same for inference."""
    use_popdist: bool = False
    """Not used: whether PopDist started the process is found out."""
    execute_encoder_on_cpu_for_generation: bool = False
    """Not supported, by optimum-graphcore neither."""

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        pod_type: Optional[str] = None,
        overrides: Optional[Mapping[str, Any]] = None,
    ) -> IPUConfig:
        """Create a config from the content of an `ipu_config.json` of either generation.

        Args:
            values: Graphcore's fields, or those of `PipelineConfig`. A value may be a dictionary by
                pod type, e.g. {pod4: 1, pod16: 4, default: 1}.
            pod_type: Which of such values to take.
            overrides: Values that take the place of those; None leaves one as it is.

        Raises:
            UserError: If a name is unknown, or a value breaks a rule.
        """
        given = select(values, [f.name for f in fields(cls)], pod_type)
        new = {SPELLINGS.get(k, k): v for k, v in (overrides or {}).items() if v is not None}
        if "layers_per_ipu" in new:
            given.pop("ipus_per_replica", None)  # it belonged to the other layers
        config = cls(**{**given, **new})
        enforce(config.value_rules())
        return config

    def to_dict(self) -> Dict[str, Any]:
        """Return the fields that the newest generation knows, and of the rest those that are set.

        optimum-graphcore 0.7 refuses the older fields, and this way reads what it can.
        """
        defaults = vars(IPUConfig())
        return {
            name: value
            for name, value in vars(self).items()
            if name not in OLD_FIELDS or value != defaults[name]
        }

    def plan_fields(self) -> Dict[str, Any]:
        """Return the fields that every pipeline has, by their names in `PipelineConfig`."""
        values = {name: vars(self)[SPELLINGS.get(name, name)] for name in PLAN_FIELDS}
        layers = self.training.shape.layers_per_stage
        return {**values, "layers_per_stage": list(layers)}

    @property
    def training(self) -> ProgramConfig:
        """The program that trains."""
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
        """The program that evaluates and predicts."""
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
        """Rules that the values alone decide."""
        broken = list(self._field_rules())
        yield from broken
        if not broken:  # programs are made of valid fields only
            for program in (self.training, self.inference):
                yield from proportion_rules(program)

    def _field_rules(self) -> Iterator[Violation]:
        values = vars(self)
        for name in COUNTS:
            yield from count_rule(name, values[name])
        for name in OPTIONAL_COUNTS:
            if values[name] is not None:
                yield from count_rule(name, values[name])
        for name, way_out in NOT_SUPPORTED.items():
            if values[name]:
                yield Violation(name, values[name], "is not supported", way_out)
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
            "Give one for each, or leave ipus_per_replica out.",
        )


def _layers(layers: List[int], ipus: Optional[int]) -> Tuple[int, ...]:
    """Return an entry for every IPU: [-1] stands for equal shares, and one IPU holds everything."""
    if ipus == 1:
        return (-1,)
    return tuple(layers) * (ipus or 1) if list(layers) == [-1] else tuple(layers)
