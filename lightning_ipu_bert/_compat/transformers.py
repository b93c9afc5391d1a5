"""transformers: 4.46 beside 5.x, and its private names.

Files are relative to https://github.com/huggingface/transformers/tree/main/src.

- `_attn_implementation` (transformers/configuration_utils.py): which mask the attention takes.
  None public in 5.24.
"""

from __future__ import annotations

from typing import Any

from transformers import BertConfig


def layer_output(output: Any) -> Any:
    """Return the hidden states that a layer of BERT gives, in a tuple before transformers 5."""
    return output[0] if isinstance(output, tuple) else output


def takes_boolean_mask(config: BertConfig) -> bool:
    """Return whether the attention of a model takes a boolean mask; else it adds a mask."""
    return bool(config._attn_implementation == "sdpa")
