"""The fields of an `ipu_config.json`: spellings, values by pod type, unused fields."""

from __future__ import annotations

from typing import Any, Dict, Iterable, Mapping, Optional

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.rules import nearest

POD_TYPES = ("pod4", "pod8", "pod16", "pod32", "pod64")
SPELLINGS = {"layers_per_stage": "layers_per_ipu"}
"""Name in `PipelineConfig`: name in `ipu_config.json`."""

FILE_FORMAT_KEYS = ("optimum_version", "transformers_version")
"""Entries about the program that wrote a file."""

OLD_FIELDS = (
    "decompose_grad_sum",
    "enable_half_first_order_momentum",
    "execute_encoder_on_cpu_for_generation",
    "profile_dir",
    "sharded_execution_for_inference",
    "use_popdist",
)
"""Fields of the first generation that the second has removed."""

NOT_SUPPORTED = {
    "serialized_embedding_splits_per_ipu": "Use embedding_serialization_factor.",
    "inference_serialized_embedding_splits_per_ipu": "Use embedding_serialization_factor.",
    "execute_encoder_on_cpu_for_generation": "Remove it.",
}
"""Fields that raise an error, each with the fix."""

NO_OUTPUT_LAYER = "the model has no output layer over the vocabulary"
WITHOUT_EFFECT = {
    "parallelize_kwargs": "the model is not rebuilt by `parallelize`",
    "inference_parallelize_kwargs": "the model is not rebuilt by `parallelize`",
    "projection_serialization_factor": NO_OUTPUT_LAYER,
    "inference_projection_serialization_factor": NO_OUTPUT_LAYER,
    "serialized_projection_splits_per_ipu": NO_OUTPUT_LAYER,
    "inference_serialized_projection_splits_per_ipu": NO_OUTPUT_LAYER,
    "use_popdist": "PopDist is used if poprun started the process",
}
"""Fields without effect, each with the reason."""

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
OUTPUT_MODES = ("sum", "all", "final", "default")

PLAN_FIELDS = (
    "layers_per_stage",
    "replication_factor",
    "gradient_accumulation_steps",
    "recompute_checkpoint_every_layer",
    "replicated_tensor_sharding",
    "optimizer_state_offchip",
)
"""Fields that all pipelines have, by their names in `PipelineConfig`."""

READ_BY_RANKS = {
    **{SPELLINGS.get(name, name): name for name in PLAN_FIELDS},
    "ipus_per_replica": "layers_per_stage",
}
"""Fields of `ipu_config.json` that `PipelineParallelStrategy` reads: the fields they set."""


def select(
    values: Mapping[str, object], known: Iterable[str], pod_type: Optional[str] = None
) -> Dict[str, Any]:
    """Return the values for one pod type, by the field names of `ipu_config.json`.

    Args:
        values: Content of a file, or fields of `PipelineConfig`. A value may be a dictionary by pod
            type, e.g. {pod4: 1, pod16: 4, default: 1}.
        known: Names of all fields.
        pod_type: Selects from such dictionaries.

    Raises:
        UserError: If a name is unknown, or there is no value for the pod type.
    """
    names, selected = list(known), {}
    for name, value in values.items():
        name = SPELLINGS.get(name, name)
        if name in FILE_FORMAT_KEYS:
            continue
        if name not in names:
            close = nearest(name, [*names, *SPELLINGS])
            raise UserError(
                f"{name}={value!r} is an unknown field of an IPU config. Did you mean '{close}'?"
            )
        selected[name] = _of_pod(name, value, pod_type)
    return selected


def _of_pod(name: str, value: object, pod_type: Optional[str]) -> object:
    """Return the value for a pod type if `value` is a dictionary by pod type."""
    if not isinstance(value, Mapping) or not value or set(value) - {*POD_TYPES, "default"}:
        return value
    if pod_type is not None and pod_type not in POD_TYPES:
        raise UserError(f"pod_type={pod_type!r} is unknown. Use one of {', '.join(POD_TYPES)}.")
    if pod_type not in value and "default" not in value:
        raise UserError(
            f"{name}={dict(value)} has no value for {pod_type or 'default'}. "
            f"Set pod_type to one of {', '.join(value)}."
        )
    return value[pod_type] if pod_type in value else value["default"]
