"""Texts as one long row of tokens, and the index arithmetic on such rows.

Letters in shapes: T tokens of all texts in a row.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple, Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


class TokenizedTexts(NamedTuple):
    """Texts as one long row of tokens, e.g. [A B C | D E] for two texts."""

    ids: IntArray
    """[T]: token ids, without special tokens."""
    counts: IntArray
    """[texts]: tokens of each text."""
    char_starts: IntArray
    """[T]: first character of each token, counted in its own text."""
    char_ends: IntArray
    """[T]: character after the last of each token."""

    @property
    def firsts(self) -> IntArray:
        """[texts]: index of each text's first token."""
        return starts_of(self.counts)


def plain_encoder(tokenizer: Any) -> Any:
    """Return a copy of the fast tokenizer's engine that neither truncates nor pads.

    Checkpoints may carry both settings in their tokenizer.json (sentence-transformers' do).
    """
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def encode(encoder: Any, texts: Sequence[str]) -> TokenizedTexts:
    """Tokenise texts, without special tokens."""
    encodings = encoder.encode_batch(list(texts), add_special_tokens=False)
    counts = np.array([len(e) for e in encodings], np.int64)
    total = int(counts.sum())
    ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int64, total)
    offsets = chain.from_iterable(chain.from_iterable(e.offsets for e in encodings))
    chars = np.fromiter(offsets, np.int64, 2 * total).reshape(-1, 2)
    return TokenizedTexts(ids, counts, chars[:, 0], chars[:, 1])


def starts_of(counts: IntArray) -> IntArray:
    """Return where each of several rows begins when they stand one behind the other."""
    return np.cumsum(counts) - counts


def ranges(first: IntArray, counts: IntArray) -> IntArray:
    """Return ``first[i], first[i] + 1, ...`` for ``counts[i]`` numbers, one i after the other."""
    within = np.arange(int(counts.sum())) - np.repeat(starts_of(counts), counts)
    return np.repeat(first, counts) + within
