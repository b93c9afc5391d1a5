"""Creation of BERT for question answering, pretrained or with random weights."""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple, Union

import torch
from transformers import AutoConfig, BertConfig, BertForQuestionAnswering

from lightning_ipu_bert.errors import UserError

HEAD = "qa_outputs"
"""The head, which is not in a pretrained BERT."""

RUN_SETTINGS = ("dtype", "torch_dtype", "_name_or_path", "transformers_version", "architectures")
"""Entries of a config that do not describe the architecture."""


def build_network(
    name_or_path: Optional[str], config: Union[Dict[str, object], BertConfig, None]
) -> Tuple[BertForQuestionAnswering, bool]:
    """Create the network in float32, independent of the dtype of a checkpoint.

    Args:
        name_or_path: Folder or hub name of pretrained weights; None uses random weights.
        config: Fields of `BertConfig` that override the checkpoint or the defaults.

    Returns:
        The network, and whether its head is pretrained.

    Raises:
        UserError: If both are None, or the model is not a BERT or cannot be loaded.
    """
    changes = config.to_dict() if isinstance(config, BertConfig) else dict(config or {})
    if name_or_path is None:
        if not changes:
            raise UserError(
                "There is no model. Set --model.model_name_or_path to a folder or hub name, or "
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
            "Set --model.model_name_or_path to a folder or hub name of a BERT."
        ) from error
    network.train()  # `from_pretrained` returns it in evaluation mode
    return network, not any(key.startswith(HEAD) for key in info["missing_keys"])


def architecture_of(config: BertConfig) -> Dict[str, Any]:
    """Return the architecture as a dict of plain values, for checkpoints."""
    fields: Dict[str, Any] = config.to_diff_dict()
    return {key: value for key, value in fields.items() if key not in RUN_SETTINGS}


def _config_of(fields: Dict[str, Any]) -> BertConfig:
    fields = {key: value for key, value in fields.items() if key not in RUN_SETTINGS}
    heads, size = fields.get("num_attention_heads", 12), fields.get("hidden_size", 768)
    if size % heads:
        raise UserError(
            f"hidden_size={size} must be divisible by num_attention_heads={heads}. "
            "Change one of them."
        )
    return BertConfig(**fields)


def _check_is_bert(config: Any, name_or_path: str) -> None:
    if config.model_type != "bert":
        raise UserError(
            f"'{name_or_path}' is a {config.model_type} model, but only BERT is supported. "
            "Use a model with model_type bert in its config.json."
        )
