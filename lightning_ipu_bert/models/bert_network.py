"""BERT for question answering: from a checkpoint of the hub or a folder, or from random weights."""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple, Union

import torch
from transformers import AutoConfig, BertConfig, BertForQuestionAnswering

from lightning_ipu_bert.errors import UserError

HEAD = "qa_outputs"
"""The part of the network that is new when a plain BERT is fine-tuned."""

RUN_SETTINGS = ("dtype", "torch_dtype", "_name_or_path", "transformers_version", "architectures")
"""Entries of a config that describe a file or a run, not the network."""


def build_network(
    name_or_path: Optional[str], config: Union[Dict[str, Any], BertConfig, None]
) -> Tuple[BertForQuestionAnswering, bool]:
    """Build the network in float32, whatever the dtype in which a checkpoint stores its weights.

    Args:
        name_or_path: Folder or hub name with weights; random weights where None.
        config: Fields of `BertConfig` that differ from the checkpoint's, or from the defaults.

    Returns:
        The network, and whether its question answering head came with the weights.

    Raises:
        UserError: If neither or no BERT is given, or it cannot be loaded.
    """
    changes = config.to_dict() if isinstance(config, BertConfig) else dict(config or {})
    if name_or_path is None:
        if not changes:
            raise UserError(
                "No model is given. Set --model.model_name_or_path to a folder or hub name, or "
                "--model.config to the fields of a BertConfig for random weights."
            )
        return BertForQuestionAnswering(_config_of(changes)), False
    load: Any = BertForQuestionAnswering.from_pretrained
    try:
        loaded = AutoConfig.from_pretrained(name_or_path)
        _check_is_bert(loaded, name_or_path)
        network, info = load(
            name_or_path,
            config=_config_of({**loaded.to_dict(), **changes}),
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"No model could be loaded from '{name_or_path}': {str(error).splitlines()[0]} "
            "Give --model.model_name_or_path a folder or a hub name that holds a BERT."
        ) from error
    network.train()  # it comes without dropout, ready for inference
    return network, not any(key.startswith(HEAD) for key in info["missing_keys"])


def architecture_of(config: BertConfig) -> Dict[str, Any]:
    """Return the config as a plain dict that describes the network alone; it fits a checkpoint."""
    fields: Dict[str, Any] = config.to_diff_dict()
    return {key: value for key, value in fields.items() if key not in RUN_SETTINGS}


def _config_of(fields: Dict[str, Any]) -> BertConfig:
    fields = {key: value for key, value in fields.items() if key not in RUN_SETTINGS}
    heads, size = fields.get("num_attention_heads", 12), fields.get("hidden_size", 768)
    if size % heads:
        raise UserError(
            f"hidden_size={size} is not a multiple of num_attention_heads={heads}. "
            "Every head needs the same number of features: change one of them."
        )
    return BertConfig(**fields)


def _check_is_bert(config: Any, name_or_path: str) -> None:
    if config.model_type != "bert":
        raise UserError(
            f"'{name_or_path}' holds a {config.model_type} model, and only BERT is supported. "
            "Give a checkpoint whose config.json says model_type bert."
        )
