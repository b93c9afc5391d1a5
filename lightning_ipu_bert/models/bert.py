"""BERT as blocks: forward of consecutive blocks, and the loss."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig

from lightning_ipu_bert._compat.transformers import layer_output, takes_boolean_mask
from lightning_ipu_bert.models.bert_settings import EMBEDDINGS, HEAD

NETWORK_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class SpanLogits(NamedTuple):
    """Logits of the answer span."""

    start_logits: Tensor
    """[B, S]: for the first token of the answer."""
    end_logits: Tensor
    """[B, S]: for the last token of the answer."""


BatchLogits = Tuple[Tensor, Tensor, Tensor]
"""``feature`` [B], start logits [B, S] and end logits [B, S], on the CPU."""


def on_host(batch: Mapping[str, Tensor], logits: SpanLogits) -> BatchLogits:
    """Return the indices of the features of a batch and its logits, in float32 on the CPU."""
    starts, ends = logits.start_logits.float().cpu(), logits.end_logits.float().cpu()
    return batch["feature"].cpu(), starts, ends


def run_blocks(
    module: nn.Module,
    config: BertConfig,
    blocks: Sequence[str],
    hidden: Any,
    batch: Mapping[str, Tensor],
) -> object:
    """Run consecutive blocks, as in `BertForQuestionAnswering` of transformers.

    Args:
        module: Contains the blocks by name.
        config: Configuration of the network.
        blocks: Names of the blocks to run, in order.
        hidden: [B, S, D], output of the previous block; None for the embeddings.
        batch: ``input_ids`` [B, S], and optionally ``attention_mask`` (1 for tokens, 0 for padding)
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
    """[B, S] -> [B, 1, 1, S], in the format of the attention implementation."""
    if attention_mask is None:
        return None
    kept = attention_mask[:, None, None, :].bool()
    if takes_boolean_mask(config):
        return kept
    zeros = torch.zeros_like(kept, dtype=dtype, device=kept.device)  # PopTorch needs the device
    return zeros.masked_fill(~kept, torch.finfo(dtype).min)


def span_loss(logits: SpanLogits, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of start and end over the batch.

    Args:
        logits: Logits of the span.
        batch: ``start_positions`` and ``end_positions`` [B], first and last token of the answer.

    Source:
        Devlin et al., BERT (arXiv:1810.04805), section 4.2.
    """
    start = cross_entropy(logits.start_logits, batch["start_positions"])
    end = cross_entropy(logits.end_logits, batch["end_positions"])
    return (start + end) / 2
