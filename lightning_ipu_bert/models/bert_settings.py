"""Blocks and sizes of BERT, on which a plan depends. No torch, no transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional

from lightning_ipu_bert.pipeline.rules import Violation

EMBEDDINGS, LAYERS, HEAD = "bert.embeddings", "bert.encoder.layer", "qa_outputs"
LABELS = {EMBEDDINGS: "Embedding", LAYERS: "Encoder", HEAD: "QA Outputs"}
"""Display names in the table "Device Allocation"."""


class BertSettings(NamedTuple):
    """Sizes of BERT, with the names and defaults (BERT-Base) of `BertConfig`."""

    vocab_size: int = 30522
    num_hidden_layers: int = 12
    max_position_embeddings: int = 512


def bert_blocks(num_hidden_layers: int) -> List[str]:
    """Return the names of the blocks of BERT in forward order."""
    return [EMBEDDINGS, *(f"{LAYERS}.{i}" for i in range(num_hidden_layers)), HEAD]


def settings_of(
    model_name_or_path: Optional[str], config: Optional[Mapping[str, object]]
) -> BertSettings:
    """Return the sizes of the model from the arguments of the module.

    Args:
        model_name_or_path: Folder or hub name; only config.json is read.
        config: Fields that override it.

    Raises:
        OSError: If the folder or hub name does not exist.
    """
    fields: Dict[str, Any] = {}
    if model_name_or_path is not None:
        fields = json.loads(_config_file(model_name_or_path).read_text("utf8"))
    fields.update(config or {})
    return BertSettings(**{k: fields[k] for k in BertSettings._fields if k in fields})


def _config_file(name_or_path: str) -> Path:
    if Path(name_or_path).is_dir():
        return Path(name_or_path) / "config.json"
    from huggingface_hub import hf_hub_download  # slow to import

    return Path(hf_hub_download(name_or_path, "config.json"))


def input_rules(
    settings: BertSettings, tokenizer_size: int, max_length: int
) -> Iterator[Violation]:
    """The model must have an embedding for every token and every position of a window."""
    if tokenizer_size > settings.vocab_size:
        yield Violation(
            "The tokenizer",
            None,
            f"has {tokenizer_size} tokens, but the model has a vocab_size of {settings.vocab_size}",
            "Set --data.tokenizer_name_or_path to that of the model, or set vocab_size in "
            "--model.config.",
        )
    longest = settings.max_position_embeddings
    if max_length > longest:
        yield Violation(
            "max_length",
            max_length,
            f"exceeds the {longest} positions of the model",
            f"Set --data.max_length to {longest} or less.",
        )
