"""Features: tokenized windows over question and passage, with the answer as a token span.

    [CLS] question [SEP] first part of the passage  [SEP]
    [CLS] question [SEP]          next part of the passage [SEP]      <- overlaps by doc_stride

Passages and questions are tokenized once each, and windows are assembled by index arithmetic on
chunks; the common implementation tokenizes a passage again for each of its questions and loops over
its characters in Python.

Shapes: Q questions, P passages, F features (windows), T tokens of all texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, Iterator, NamedTuple, Sequence, Tuple

import numpy as np

from lightning_ipu_bert.data.questions import Question, QuestionSet
from lightning_ipu_bert.data.settings import SPECIAL_TOKENS, Windowing
from lightning_ipu_bert.data.tokenized import (
    IntArray,
    TokenizedTexts,
    encode,
    plain_encoder,
    ranges,
    starts_of,
)
from lightning_ipu_bert.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTIONS_PER_CHUNK = 4096
"""Limits the memory of a chunk to a few hundred megabytes."""


class TokenSpans(NamedTuple):
    """Token spans of answers in their passages, -1 without an answer; each [Q].

    The first character of the answer is in the tokens ``start_low..start_high``, the last one in
    ``end_low..end_high``. Low and high differ only if one character is in several tokens.
    """

    start_low: IntArray
    start_high: IntArray
    end_low: IntArray
    end_high: IntArray


def features_in_chunks(
    question_set: QuestionSet, tokenizer: PreTrainedTokenizerBase, windowing: Windowing
) -> Iterator[Tuple[int, Dict[str, IntArray]]]:
    """Yield the features of a split, in chunks of questions.

    Args:
        question_set: The questions; features have the same order.
        tokenizer: A fast tokenizer of transformers with BERT's pair template.
        windowing: How passages are split into windows.

    Yields:
        The number of questions of a chunk and their features by column: see `build_features`.

    Raises:
        UserError: If a question is too long for the window.
    """
    encoder = plain_encoder(tokenizer)
    special = (int(tokenizer.cls_token_id), int(tokenizer.sep_token_id))
    for first in range(0, len(question_set.questions), QUESTIONS_PER_CHUNK):
        questions = question_set.questions[first : first + QUESTIONS_PER_CHUNK]
        used, passage_of = np.unique([q.passage for q in questions], return_inverse=True)
        passages = encode(encoder, [question_set.passages[p] for p in used])
        asked = encode(encoder, [q.text.lstrip() for q in questions])
        _check_lengths(questions, asked.counts, passages.counts[passage_of], windowing)
        spans = answer_token_spans(questions, passages, passage_of)
        yield (
            len(questions),
            build_features(asked, passages, passage_of, spans, windowing, special, first),
        )


def _check_lengths(
    questions: Sequence[Question], asked: IntArray, passage: IntArray, windowing: Windowing
) -> None:
    if (passage == 0).any():
        q = int(np.flatnonzero(passage == 0)[0])
        raise UserError(
            f"The context of question '{questions[q].id}' has no character in the vocabulary of "
            "the tokenizer. Every question needs a passage: fix it or remove the question."
        )
    room = windowing.max_length - SPECIAL_TOKENS - asked  # [Q] for passage tokens in a window
    stuck = (room < 1) | ((passage > room) & (room <= windowing.doc_stride))
    if stuck.any():
        q = int(np.flatnonzero(stuck)[0])
        most = windowing.max_length - SPECIAL_TOKENS - windowing.doc_stride - 1
        raise UserError(
            f"Question '{questions[q].id}' ({questions[q].text.strip()[:60]!r}) has {asked[q]} "
            f"tokens; at max_length={windowing.max_length} and doc_stride={windowing.doc_stride} "
            f"at most {most} leave room to move through its passage. "
            "Raise max_length, lower doc_stride, or shorten it."
        )


def answer_token_spans(
    questions: Sequence[Question], passages: TokenizedTexts, passage_of: IntArray
) -> TokenSpans:
    """Return the tokens of the first and last character of the first answer of every question.

    White space and characters that the tokenizer drops are in no token; the answer starts and ends
    at its outermost characters that are. Token indices are relative to the passage.
    """
    answered = np.array([bool(q.answers) for q in questions])
    first_char = np.array([q.answers[0].start if q.answers else 0 for q in questions], np.int64)
    length = np.array([len(q.answers[0].text) if q.answers else 1 for q in questions], np.int64)

    # A single search for all passages: shift each to a separate range of characters.
    gap = int(max(passages.char_ends.max(initial=0), (first_char + length).max(initial=0))) + 1
    shift = np.arange(len(passages.counts)) * gap
    starts = passages.char_starts + np.repeat(shift, passages.counts)
    ends = passages.char_ends + np.repeat(shift, passages.counts)
    begin = first_char + shift[passage_of]
    last = begin + length - 1

    # First token that ends after `begin`, and last token that starts no later than `last`.
    entry = np.minimum(np.searchsorted(ends, begin, "right"), len(ends) - 1)
    leave = np.maximum(np.searchsorted(starts, last, "right") - 1, 0)
    begin = np.maximum(begin, starts[entry])
    last = np.minimum(last, ends[leave] - 1)
    answered &= begin <= last

    base = passages.firsts[passage_of]
    bounds = (
        np.searchsorted(ends, begin, "right"),
        np.searchsorted(starts, begin, "right") - 1,
        np.searchsorted(ends, last, "right"),
        np.searchsorted(starts, last, "right") - 1,
    )
    return TokenSpans(*(np.where(answered, bound - base, -1) for bound in bounds))


def build_features(
    asked: TokenizedTexts,
    passages: TokenizedTexts,
    passage_of: IntArray,
    spans: TokenSpans,
    windowing: Windowing,
    special: Tuple[int, int],
    first_question: int = 0,
) -> Dict[str, IntArray]:
    """Split passages into windows after their questions, for a chunk of questions.

    Args:
        asked: Tokens of the questions.
        passages: Tokens of the passages.
        passage_of: [Q], index of the passage of each question.
        spans: Token spans of the answers in their passages.
        windowing: How passages are split into windows.
        special: Token ids of [CLS] and [SEP].
        first_question: Index in the split of the first question of the chunk.

    Returns:
        Columns of features. ``counts`` [F] are the lengths of the rows of
        ``input_ids`` and ``token_type_ids`` (flat, [T]); ``passage_counts`` [F] those of
        ``offset_starts`` and ``offset_ends`` (characters of the passage tokens). The other columns
        are [F]: ``question`` (index in the split), ``context_start`` (position of the first passage
        token), ``start_positions`` and ``end_positions`` (first and last token of the answer, or 0,
        [CLS], if it is not in the window).
    """
    room = windowing.max_length - SPECIAL_TOKENS - asked.counts  # [Q]
    length = passages.counts[passage_of]  # [Q]
    step = np.maximum(room - windowing.doc_stride, 1)
    windows = 1 + np.maximum(-(-(length - room) // step), 0)  # [Q]

    question = np.repeat(np.arange(len(windows)), windows)  # [F]
    lower = ranges(np.zeros_like(windows), windows) * step[question]
    upper = np.minimum(lower + room[question], length[question])
    context_start = asked.counts[question] + 2
    counts = context_start + (upper - lower) + 1

    row = starts_of(counts)  # [F] start of each feature in the flat array
    ids = np.full(int(counts.sum()), special[1])
    ids[row] = special[0]
    ids[ranges(row + 1, asked.counts[question])] = asked.ids[
        ranges(asked.firsts[question], asked.counts[question])
    ]
    source = ranges(passages.firsts[passage_of[question]] + lower, upper - lower)
    ids[ranges(row + context_start, upper - lower)] = passages.ids[source]
    token_types = np.zeros(len(ids), np.int8)
    token_types[ranges(row + context_start, upper - lower + 1)] = 1

    start, end = smallest_spans(spans, question, lower, upper)
    held = start >= 0
    return {
        "counts": counts,
        "input_ids": ids,
        "token_type_ids": token_types,
        "start_positions": np.where(held, start - lower + context_start, 0),
        "end_positions": np.where(held, end - lower + context_start, 0),
        "question": question + first_question,
        "context_start": context_start,
        "passage_counts": upper - lower,
        "offset_starts": passages.char_starts[source],
        "offset_ends": passages.char_ends[source],
    }


def smallest_spans(
    spans: TokenSpans, question: IntArray, lower: IntArray, upper: IntArray
) -> Tuple[IntArray, IntArray]:
    """Return the smallest token span that covers the answer, for every window.

    Args:
        spans: Token spans of the answers.
        question: [F], index of the question.
        lower: [F], first passage token of the window.
        upper: [F], end of its passage tokens (exclusive).

    Returns:
        First and last token of the span in the passage; both [F], -1 if the window does not contain
        the complete answer.
    """
    start = np.minimum(spans.start_high[question], upper - 1)
    end = np.maximum(spans.end_low[question], lower)
    held = (start >= np.maximum(spans.start_low[question], lower)) & (
        end <= np.minimum(spans.end_high[question], upper - 1)
    )
    held &= spans.start_low[question] >= 0
    # If one character is in several tokens the two may cross: one token covers it.
    start = np.minimum(start, end)
    return np.where(held, start, -1), np.where(held, end, -1)
