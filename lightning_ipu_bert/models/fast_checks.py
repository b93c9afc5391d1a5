"""Where a fast BERT layer may run: only where it does what the layer of transformers would do."""

from __future__ import annotations

from typing import Any, Dict, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertIntermediate,
    BertLayer,
    BertOutput,
    BertSelfAttention,
    BertSelfOutput,
)

from lightning_ipu_bert._compat.torch import (
    cpu_autocast_dtype,
    has_global_hooks,
    is_untouched,
    runs_eagerly_on_cpu,
)
from lightning_ipu_bert._compat.transformers import LAYERS_RETURN_TENSORS, attention_of
from lightning_ipu_bert.ops.dropout import Dropout
from lightning_ipu_bert.ops.masks import has_mask

PARTS: Dict[str, Tuple[Type[nn.Module], ...]] = {
    "attention": (BertAttention,),
    "attention.self": (BertSelfAttention,),
    "attention.self.query": (nn.Linear,),
    "attention.self.key": (nn.Linear,),
    "attention.self.value": (nn.Linear,),
    "attention.self.dropout": (nn.Dropout, Dropout),
    "attention.output": (BertSelfOutput,),
    "attention.output.dense": (nn.Linear,),
    "attention.output.LayerNorm": (nn.LayerNorm,),
    "attention.output.dropout": (nn.Dropout, Dropout),
    "intermediate": (BertIntermediate,),
    "intermediate.dense": (nn.Linear,),
    "intermediate.intermediate_act_fn": (GELUActivation,),
    "output": (BertOutput,),
    "output.dense": (nn.Linear,),
    "output.LayerNorm": (nn.LayerNorm,),
    "output.dropout": (nn.Dropout, Dropout),
}
"""The classes of the parts of a layer, by their names."""
FORWARDS: Dict[Any, object] = {
    kind: vars(kind)["forward"] for kinds in (*PARTS.values(), (BertLayer,)) for kind in kinds
}
"""What the classes do when they are called, to see it when they are patched."""
TENSORS = 2 * sum(kinds[0] in (nn.Linear, nn.LayerNorm) for kinds in PARTS.values())
"""Number of parameters of a layer: every weight has a bias."""
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def inputs_allow(hidden: Tensor, mask: Optional[Tensor], others: Sequence[object]) -> bool:
    """Return whether a fast layer can run with these inputs.

    Args:
        hidden: [B, S, D]
        mask: The attention mask.
        others: Further arguments of the layer.
    """
    if any(other is not None for other in others) or not runs_eagerly_on_cpu(hidden):
        return False
    if hidden.dim() != 3 or not hidden.numel() or not LAYERS_RETURN_TENSORS:
        return False
    examples, length, _ = hidden.shape
    shapes = ((examples, 1, queries, length) for queries in (1, length))
    constant = mask is None or not mask.requires_grad  # a learned mask would have no gradient
    return constant and (mask is None or any(mask.shape == shape for shape in shapes))


def layer_allows(layer: BertLayer) -> bool:
    """Return whether a layer is as transformers makes it, without hooks and adapters inside."""
    parts = {name: part for name, part in layer.named_modules() if name}
    return (
        parts.keys() == PARTS.keys()
        and all(type(part) in PARTS[name] for name, part in parts.items())
        and all(is_untouched(part) for part in parts.values())
        and not has_global_hooks()
        and all(vars(kind)["forward"] is forward for kind, forward in FORWARDS.items())
        and settings_allow(layer)
        and parameters_allow(layer)
    )


def settings_allow(layer: BertLayer) -> bool:
    """Return whether the settings of a layer are those of an encoder with GELU."""
    attention = layer.attention.self
    dropouts = (attention.dropout, layer.attention.output.dropout, layer.output.dropout)
    return (
        not (layer.is_decoder or layer.add_cross_attention or layer.chunk_size_feed_forward)
        and "feed_forward_chunk" not in vars(layer)
        and attention_of(attention.config) in ("eager", "sdpa")
        and attention.scaling == attention.attention_head_size**-0.5
        and layer.intermediate.intermediate_act_fn.act is nn.functional.gelu
        and all(dropout.p == 0 or has_mask(dropout.p) for dropout in dropouts)
    )


def parameters_allow(layer: BertLayer) -> bool:
    """Return whether the parameters are plain, of one type, and of the shapes of a whole layer."""
    parameters = list(layer.parameters())
    dtype, size = parameters[0].dtype, layer.output.dense.out_features
    return (
        len(parameters)
        == 2 * sum(kinds[0] in (nn.Linear, nn.LayerNorm) for kinds in PARTS.values())
        and all(type(p) is nn.Parameter and p.dtype == dtype for p in parameters)
        and layer.attention.self.query.weight.shape == (size, size)
        and (cpu_autocast_dtype() or dtype) in DTYPES
    )
