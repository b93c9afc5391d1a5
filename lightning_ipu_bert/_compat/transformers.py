"""transformers: differences between 4.46 and 5.x, and private names.

Files are relative to https://github.com/huggingface/transformers/tree/main/src.

- `_attn_implementation` (transformers/configuration_utils.py): the kind of mask of the attention.
  No public API in 5.24.
"""

from __future__ import annotations

import transformers
from transformers import BertConfig

LAYERS_RETURN_TENSORS = int(transformers.__version__.split(".")[0]) >= 5
"""Whether layers return their hidden states, and not a tuple of outputs."""


def layer_output(output: object) -> object:
    """Return the hidden states from the output of a BERT layer, a tuple before transformers 5."""
    return output[0] if isinstance(output, tuple) else output


def takes_boolean_mask(config: BertConfig) -> bool:
    """Return whether the attention of a model takes a boolean mask instead of an additive one."""
    return attention_of(config) == "sdpa"


def attention_of(config: BertConfig) -> str:
    """Return the name of the attention implementation."""
    return str(config._attn_implementation)
