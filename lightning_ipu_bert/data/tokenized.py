"""Texts as a flat array of tokens, and index arithmetic on such arrays.

Shapes: T tokens of all texts.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, Sequence

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

IntArray = npt.NDArray[np.int64]


class TokenizedTexts(NamedTuple):
    """Texts as a flat array of tokens, e.g. [A B C | D E] for two texts."""

    ids: IntArray
    """[T]: token ids, without special tokens."""
    counts: IntArray
    """[texts]: number of tokens of each text."""
    char_starts: IntArray
    """[T]: index in the text of the first character of each token."""
    char_ends: IntArray
    """[T]: end of each token (exclusive)."""

    @property
    def firsts(self) -> IntArray:
        """[texts]: index of the first token of each text."""
        return starts_of(self.counts)


def plain_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the backend of a fast tokenizer without truncation and padding.

    Both may be set in the tokenizer.json of a checkpoint (e.g. of sentence-transformers).
    """
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def encode(encoder: Tokenizer, texts: Sequence[str]) -> TokenizedTexts:
    """Tokenize texts, without special tokens."""
    encodings = encoder.encode_batch(list(texts), add_special_tokens=False)
    counts = np.array([len(e) for e in encodings], np.int64)
    total = int(counts.sum())
    ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int64, total)
    offsets = chain.from_iterable(chain.from_iterable(e.offsets for e in encodings))
    chars = np.fromiter(offsets, np.int64, 2 * total).reshape(-1, 2)
    return TokenizedTexts(ids, counts, chars[:, 0], chars[:, 1])


def starts_of(counts: IntArray) -> IntArray:
    """Return the start of each row in a flat array."""
    return np.cumsum(counts) - counts


def ranges(first: IntArray, counts: IntArray) -> IntArray:
    """Return ``first[i], first[i] + 1, ...`` (``counts[i]`` numbers), concatenated over i."""
    within = np.arange(int(counts.sum())) - np.repeat(starts_of(counts), counts)
    return np.repeat(first, counts) + within
