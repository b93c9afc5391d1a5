"""`IPUConfig`: how a model runs on IPUs, in the words of Graphcore's `ipu_config.json`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.pipeline.ipu_rules import check_config

POD_TYPES = ("pod4", "pod8", "pod16", "pod32", "pod64")
SPELLINGS = {"layers_per_stage": "layers_per_ipu"}
"""The name in `PipelineConfig`, and Graphcore's."""

FILE_FORMAT_KEYS = ("optimum_version", "transformers_version")
"""What a file says of the program that wrote it."""


class Graph(NamedTuple):
    """What is compiled: training and inference are two, with a pipeline each."""

    training: bool
    layers_per_ipu: List[int]
    replication_factor: int
    gradient_accumulation_steps: int
    device_iterations: int
    matmul_proportion: List[float]
    """Share of each IPU's memory for the temporary data of matrix products."""
    embedding_serialization_factor: int
    pipelined: bool
    """Whether stages work side by side; else one after the other (sharded)."""

    @property
    def num_stages(self) -> int:
        """Stages of the forward: IPUs of a replica."""
        return len(self.layers_per_ipu)

    @property
    def num_ipus(self) -> int:
        """IPUs of all replicas."""
        return self.num_stages * self.replication_factor

    @property
    def micro_batches_per_call(self) -> int:
        """Micro-batches that one call from the host works through, over all replicas."""
        return self.device_iterations * self.gradient_accumulation_steps * self.replication_factor


@dataclass(frozen=True)
class IPUConfig:
    """How a model runs on IPUs. The names are those of Graphcore's `ipu_config.json`.

    Raises:
        UserError: If a value, or two of them together, break a rule.

    Source:
        IPUConfig of optimum-graphcore 0.3.1 and 0.7.1; PopTorch user guide 3.4, sections 4 and 5.
    """

    layers_per_ipu: List[int] = field(default_factory=lambda: [-1])
    """Numbered layers on each IPU of a replica, e.g. [3, 7, 7, 7]; -1 takes an equal share of the
    rest. The blocks before the layers lie on the first IPU, those behind them on the last."""
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

    def __post_init__(self) -> None:
        """Check every rule that the values alone decide."""
        check_config(self)

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        pod_type: Optional[str] = None,
        plan: Optional[Mapping[str, Any]] = None,
    ) -> IPUConfig:
        """Create a config from the content of an `ipu_config.json` of either generation.

        Args:
            values: Graphcore's fields, or those of `PipelineConfig`. A value may be a dictionary by
                pod type, e.g. {pod4: 1, pod16: 4, default: 1}.
            pod_type: Which of such values to take.
            plan: Values that take the place of those; None leaves one as it is.

        Raises:
            UserError: If a name is unknown, or a value breaks a rule.
        """
        given = resolved(values, pod_type)
        new = {SPELLINGS.get(k, k): v for k, v in (plan or {}).items() if v is not None}
        if "layers_per_ipu" in new:
            given.pop("ipus_per_replica", None)  # it belonged to the other layers
        return cls(**{**given, **new})

    def to_dict(self) -> Dict[str, Any]:
        """Return the fields that the newest generation knows, and of the rest those that are set.

        optimum-graphcore 0.7 refuses the older fields, and this way reads what it can.
        """
        defaults = IPUConfig()
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if name not in OLD_FIELDS or value != getattr(defaults, name)
        }

    @property
    def plan(self) -> PipelineConfig:
        """The part of it that every pipeline has."""
        return PipelineConfig(
            layers_per_stage=self.training.layers_per_ipu,
            replication_factor=self.replication_factor,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            recompute_checkpoint_every_layer=self.recompute_checkpoint_every_layer,
            replicated_tensor_sharding=self.replicated_tensor_sharding,
            optimizer_state_offchip=self.optimizer_state_offchip,
        )

    @property
    def training(self) -> Graph:
        """What trains."""
        layers = _layers(self.layers_per_ipu, self.ipus_per_replica)
        return Graph(
            training=True,
            layers_per_ipu=layers,
            replication_factor=self.replication_factor,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            device_iterations=self.device_iterations,
            matmul_proportion=_per_ipu(self.matmul_proportion, len(layers)),
            embedding_serialization_factor=self.embedding_serialization_factor or 1,
            pipelined=True,
        )

    @property
    def inference(self) -> Graph:
        """What evaluates and predicts."""
        own = self.inference_layers_per_ipu is not None
        ipus = self.inference_ipus_per_replica or (None if own else self.ipus_per_replica)
        layers = _layers(self.inference_layers_per_ipu or self.layers_per_ipu, ipus)
        proportion = self.inference_matmul_proportion
        if proportion is None:
            fits = not isinstance(self.matmul_proportion, list) or len(layers) == len(
                self.matmul_proportion
            )
            proportion = self.matmul_proportion if fits else DEFAULT_PROPORTION
        factor = self.inference_embedding_serialization_factor
        return Graph(
            training=False,
            layers_per_ipu=layers,
            replication_factor=self.inference_replication_factor,
            gradient_accumulation_steps=1,
            device_iterations=self.inference_device_iterations,
            matmul_proportion=_per_ipu(proportion, len(layers)),
            embedding_serialization_factor=factor or self.embedding_serialization_factor or 1,
            pipelined=not self.sharded_execution_for_inference,
        )

    @property
    def shards_optimizer(self) -> bool:
        """Whether the optimizer's state is split: one replica has nobody to share with."""
        return self.replicated_tensor_sharding and self.replication_factor > 1

    def ignored(self) -> List[Tuple[str, str]]:
        """Return the fields that are set and have no effect, each with the reason."""
        defaults = IPUConfig()
        values = {name: getattr(self, name) for name in WITHOUT_EFFECT}
        return [
            (f"{name}={value!r}", WITHOUT_EFFECT[name])
            for name, value in values.items()
            if value != getattr(defaults, name) and repr(value) != "1"  # one part is no part
        ]


DEFAULT_PROPORTION = 0.2
"""Of an inference pipeline that training's list does not fit, as in optimum-graphcore."""

OLD_FIELDS = (
    "decompose_grad_sum",
    "enable_half_first_order_momentum",
    "execute_encoder_on_cpu_for_generation",
    "profile_dir",
    "sharded_execution_for_inference",
    "use_popdist",
)
"""Fields of the first generation that the second no longer has."""

WITHOUT_EFFECT = {
    "parallelize_kwargs": "the model is not taken apart, and no `parallelize` is called",
    "inference_parallelize_kwargs": "the model is not taken apart, and no `parallelize` is called",
    "projection_serialization_factor": "the model has no output layer over a vocabulary",
    "inference_projection_serialization_factor": "the model has no such output layer",
    "serialized_projection_splits_per_ipu": "the model has no output layer over a vocabulary",
    "inference_serialized_projection_splits_per_ipu": "the model has no such output layer",
    "use_popdist": "PopDist is used where poprun started the process",
}


def resolved(values: Mapping[str, Any], pod_type: Optional[str] = None) -> Dict[str, Any]:
    """Return the values of an `ipu_config.json` by the names of the fields, for one type of pod.

    Args:
        values: As for `IPUConfig.from_dict`.
        pod_type: As there.

    Raises:
        UserError: If a name is unknown, or there is no value for the pod.
    """
    known = {f.name for f in fields(IPUConfig)}
    given: Dict[str, Any] = {}
    for name, value in values.items():
        name = SPELLINGS.get(name, name)
        if name in FILE_FORMAT_KEYS:
            continue
        if name not in known:
            near = get_close_matches(name, [*known, *SPELLINGS], n=1, cutoff=0.0)[0]
            raise UserError(
                f"{name}={value!r} is no field of an IPU config. Did you mean '{near}'?"
            )
        given[name] = _for_pod(name, value, pod_type)
    return given


def _for_pod(name: str, value: Any, pod_type: Optional[str]) -> Any:
    """Take the value of a pod type out of a dictionary of them."""
    if not isinstance(value, Mapping) or not value or set(value) - {*POD_TYPES, "default"}:
        return value
    if pod_type is not None and pod_type not in POD_TYPES:
        raise UserError(f"pod_type={pod_type!r} is unknown. Use one of {', '.join(POD_TYPES)}.")
    if pod_type not in value and "default" not in value:
        raise UserError(
            f"{name}={dict(value)} has no value for {pod_type or 'default'}. "
            f"Give pod_type, one of {', '.join(value)}."
        )
    return value[pod_type] if pod_type in value else value["default"]


def _layers(layers: List[int], ipus: Optional[int]) -> List[int]:
    """Return an entry for every IPU: [-1] stands for equal shares, and one IPU holds everything."""
    if ipus == 1:
        return [-1]
    return list(layers) * (ipus or 1) if list(layers) == [-1] else list(layers)


def _per_ipu(proportion: Union[float, List[float]], ipus: int) -> List[float]:
    return list(proportion) if isinstance(proportion, (list, tuple)) else [proportion] * ipus
