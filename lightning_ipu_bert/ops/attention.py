"""Attention of all heads, forward and backward: no more passes over the scores than needed."""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from lightning_ipu_bert._compat.torch import softmax_backward
from lightning_ipu_bert.ops.masks import dropped_share, keep_mask, masked, masked_

CHUNK = 2**22
"""Largest number of scores at a time: they should stay in the cache of the processor."""


class Weights(NamedTuple):
    """What the backward needs of a chunk of examples, each [B * H, S, S]."""

    probabilities: Tensor
    """After the softmax, before dropout."""
    mask: Optional[Tensor]
    """Of the dropout; None without."""


def examples_per_chunk(examples: int, scores: int) -> int:
    """Return the size of equal chunks of examples with `scores` scores each."""
    chunks = -(-examples * scores // CHUNK)
    return -(-examples // min(chunks, examples))


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Optional[Tensor], p: float
) -> Tuple[Tensor, List[Weights]]:
    """Return softmax(query key^T + bias) value, and what the backward needs.

    Args:
        query: [B, H, S, d], contiguous as all of them, divided by sqrt(d).
        key: [B, H, S, d]
        value: [B, H, S, d]
        bias: [B, 1, 1 or S, S], added to the scores; None without.
        p: Rate of dropout of the probabilities.

    Returns:
        [B, H, S, d], and the weights of every chunk of examples.

    Source:
        Vaswani et al., Attention Is All You Need (arXiv:1706.03762), section 3.2.
    """
    examples, heads, length, _ = query.shape
    size = examples_per_chunk(examples, heads * length * length)
    output, kept = torch.empty_like(query), []
    for first in range(0, examples, size):
        q, k, v, out = (x[first : first + size].flatten(0, 1) for x in (query, key, value, output))
        scores = torch.bmm(q, k.transpose(1, 2))
        if bias is not None:
            scores.view(-1, heads, length, length).add_(bias[first : first + size])
        weights = Weights(torch.softmax(scores, -1), keep_mask(scores.shape, p, scores.dtype))
        torch.bmm(masked(*weights), v, out=out)
        kept.append(weights)
    return output.mul_(1 / (1 - dropped_share(p))), kept


def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: List[Weights], p: float
) -> Tensor:
    """Return the gradients of query, key and value.

    Args:
        gradient: [B, H, S, d], of the output; it is modified.
        query: [B, H, S, d]
        key: [B, H, S, d]
        value: [B, H, S, d]
        kept: The weights of all chunks.
        p: Rate of dropout of the probabilities.

    Returns:
        [3, B, H, S, d]
    """
    gradients = query.new_empty(3, *query.shape)
    gradient.mul_(1 / (1 - dropped_share(p)))
    size = -(-len(query) // len(kept))
    for number, weights in enumerate(kept):
        part = slice(number * size, (number + 1) * size)
        q, k, v, g = (x[part].flatten(0, 1) for x in (query, key, value, gradient))
        dq, dk, dv = (x[part].flatten(0, 1) for x in gradients)
        torch.bmm(masked(*weights).transpose(1, 2), g, out=dv)
        d_probabilities = masked_(torch.bmm(g, v.transpose(1, 2)), weights.mask)
        d_scores = softmax_backward(d_probabilities, weights.probabilities)
        torch.bmm(d_scores, k, out=dq)
        torch.bmm(d_scores.transpose(1, 2), q, out=dk)
    return gradients
