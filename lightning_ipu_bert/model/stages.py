"""BERT as blocks: the forward of any consecutive part of it."""

from __future__ import annotations

from typing import Any, List, Mapping, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn
from transformers import BertConfig

from lightning_ipu_bert._compat import layer_output

EMBEDDINGS, LAYERS, HEAD = "bert.embeddings", "bert.encoder.layer", "qa_outputs"
NETWORK_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LABELS = {EMBEDDINGS: "Embedding", LAYERS: "Encoder", HEAD: "QA Outputs"}


class SpanLogits(NamedTuple):
    """Scores of every token, before the softmax over a window."""

    start_logits: Tensor
    """[B, S]: as the first token of the answer."""
    end_logits: Tensor
    """[B, S]: as its last token."""


def bert_blocks(config: BertConfig) -> List[str]:
    """Return the names of BERT's blocks in forward order."""
    return [EMBEDDINGS, *(f"{LAYERS}.{i}" for i in range(config.num_hidden_layers)), HEAD]


def run_blocks(
    module: nn.Module,
    config: BertConfig,
    blocks: Sequence[str],
    hidden: Any,
    batch: Mapping[str, Tensor],
) -> Any:
    """Run consecutive blocks, as Hugging Face's `BertForQuestionAnswering` does.

    Args:
        module: Holds the blocks under their names.
        config: Of the network.
        blocks: What to run, in order.
        hidden: [B, S, D], what the block before returned; None before the embeddings.
        batch: ``input_ids`` [B, S], and if given ``attention_mask`` (1 for tokens, 0 for padding)
            and ``token_type_ids`` (0 for the question, 1 for the passage).

    Returns:
        [B, S, D], or `SpanLogits` if the last block is the head.
    """
    mask: Optional[Tensor] = None
    for name in blocks:
        block = module.get_submodule(name)
        if name == EMBEDDINGS:
            hidden = block(input_ids=batch["input_ids"], token_type_ids=batch.get("token_type_ids"))
        elif name == HEAD:
            hidden = SpanLogits(*block(hidden).unbind(-1))  # [B, S, D] -> [B, S, 2] -> 2 x [B, S]
        else:
            if mask is None:
                mask = _layer_mask(batch.get("attention_mask"), config, hidden.dtype)
            hidden = layer_output(block(hidden, mask))
    return hidden


def _layer_mask(
    attention_mask: Optional[Tensor], config: BertConfig, dtype: torch.dtype
) -> Optional[Tensor]:
    """[B, S] -> [B, 1, 1, S], in the form that the attention of this config takes."""
    if attention_mask is None:
        return None
    kept = attention_mask[:, None, None, :].bool()
    if config._attn_implementation == "sdpa":
        return kept
    zeros = torch.zeros_like(kept, dtype=dtype, device=kept.device)  # PopTorch wants it named
    return zeros.masked_fill(~kept, torch.finfo(dtype).min)
