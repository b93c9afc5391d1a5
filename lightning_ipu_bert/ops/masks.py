"""Dropout masks from 16 random bits per element, applied by a bitwise AND.

`bernoulli_` draws one number after the other, and a boolean mask is cast whenever it is used. Here
a 64-bit word of a fast generator decides four elements, and a mask has the width of what it is
applied to: all bits set for a kept element, none for a dropped one.

The generator (SFC64 of NumPy, which takes half the time of the Mersenne Twister of torch) is seeded
by torch's default CPU generator. So masks are those of torch's random state: they repeat when it
is restored, and differ on ranks that differ in it.
"""

from __future__ import annotations

import math
from typing import Optional, Sequence

import numpy as np
import torch
from torch import Tensor

LEVELS = 2**16
"""Number of values of a random word of 16 bits."""
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type of a mask, by the size of an element in bytes."""


def dropped_share(p: float) -> float:
    """Return the share of elements that a mask for the rate `p` drops: `p` to 1/65536."""
    return round(p * LEVELS) / LEVELS


def has_mask(p: float) -> bool:
    """Return whether masks for the rate `p` drop some elements and keep others."""
    return 0 < dropped_share(p) < 1


def keep_mask(shape: Sequence[int], p: float, dtype: torch.dtype) -> Optional[Tensor]:
    """Draw a mask.

    Args:
        shape: Shape of the mask.
        p: Rate of dropped elements, 0 or such that `has_mask` is true.
        dtype: Type of the tensors that the mask is applied to.

    Returns:
        Integers of the size of `dtype`: -1 for kept elements, 0 for dropped ones. None if `p` is 0.
    """
    if not has_mask(p):
        return None
    words = random_words(math.prod(shape)).view(*shape)
    first_dropped = LEVELS // 2 - round(p * LEVELS)  # words are from -LEVELS / 2 on
    mask = words.clamp_(first_dropped - 1, first_dropped).sub_(first_dropped)
    return mask.to(INTEGERS[dtype.itemsize])


def random_words(count: int) -> Tensor:
    """Draw `count` independent words of 16 bits, as int16."""
    seed = int(torch.randint(torch.iinfo(torch.int64).max, ()))
    words = np.random.SFC64(seed).random_raw(-(-count // 4))
    return torch.from_numpy(words.view(np.int16))[:count]


def masked(x: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Return a tensor with 0 for dropped elements."""
    return x if mask is None else (x.view(mask.dtype) & mask).view(x.dtype)


def masked_(x: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Set dropped elements of a tensor to 0 in place."""
    if mask is not None:
        x.view(mask.dtype).bitwise_and_(mask)
    return x
