"""BERT layers for CPUs: those of transformers, with a forward and backward of our own.

Parameters, their names and hooks on layers are unaffected. A fast layer runs as that of
transformers wherever `fast_checks` finds anything that it would have to do differently.
"""

from __future__ import annotations

from typing import Any, Dict, Optional

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer
from typing_extensions import override

from lightning_ipu_bert._compat.torch import cpu_autocast_dtype
from lightning_ipu_bert.models.fast_checks import inputs_allow, layer_allows
from lightning_ipu_bert.ops.attention_block import (
    AttentionParameters,
    AttentionSettings,
    attention_block,
)
from lightning_ipu_bert.ops.dropout import Dropout
from lightning_ipu_bert.ops.feed_forward_block import (
    FeedForwardParameters,
    FeedForwardSettings,
    feed_forward_block,
)


def use_fast_layers(network: nn.Module, fast: bool = True) -> None:
    """Let the BERT layers and dropouts of a network run fast on CPUs, or as before, in place.

    Only layers and dropouts of exactly the classes of transformers and torch are changed.

    Args:
        network: A BERT of transformers.
        fast: False changes the classes back.
    """
    pairs: Dict[type, type] = {BertLayer: FastBertLayer, nn.Dropout: Dropout}
    classes = pairs if fast else {ours: theirs for theirs, ours in pairs.items()}
    for module in network.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]


class FastBertLayer(BertLayer):  # type: ignore[no-untyped-call]  # GradientCheckpointingLayer's
    """A layer of transformers that runs by `ops` where the result is the same."""

    @override
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Optional[Tensor] = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return the hidden states, [B, S, D], as those of `BertLayer`.

        Args:
            hidden_states: [B, S, D]
            attention_mask: [B, 1, 1 or S, S], additive or true for keys that are attended to.
            args: Other arguments of `BertLayer`, with which it runs as in transformers.
            kwargs: Likewise.
        """
        others = (*args, *kwargs.values())
        if inputs_allow(hidden_states, attention_mask, others) and layer_allows(self):
            return run_fast(self, hidden_states, attention_mask)
        return super().forward(hidden_states, attention_mask, *args, **kwargs)


def run_fast(layer: BertLayer, hidden: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Run a layer by `ops`."""
    attention, projection, output = layer.attention.self, layer.attention.output, layer.output
    inner = layer.intermediate.dense
    dtype = cpu_autocast_dtype() or inner.weight.dtype
    linears = (attention.query, attention.key, attention.value)
    hidden = attention_block(
        hidden,
        score_bias(mask, dtype),
        AttentionSettings(
            attention.num_attention_heads,
            rate(attention.dropout),
            rate(projection.dropout),
            projection.LayerNorm.eps,
            dtype,
        ),
        AttentionParameters(
            *(linear.weight for linear in linears),
            *(linear.bias for linear in linears),
            *projection.dense.parameters(),
            *projection.LayerNorm.parameters(),
        ),
    )
    return feed_forward_block(
        hidden,
        FeedForwardSettings(rate(output.dropout), output.LayerNorm.eps, dtype),
        FeedForwardParameters(
            *inner.parameters(), *output.dense.parameters(), *output.LayerNorm.parameters()
        ),
    )


def rate(dropout: nn.Dropout) -> float:
    """Return the rate of a dropout in its mode."""
    return dropout.p if dropout.training else 0.0


def score_bias(mask: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    """Return what is added to the scores, [B, 1, 1 or S, S]; None if nothing is masked."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        return mask.to(dtype) if mask.any() else None
    if mask.all():
        return None
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
