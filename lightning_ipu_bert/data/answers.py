"""Decoding of start and end logits into answers, vectorized over questions.

The candidates of a window are the spans of its `n_best` best starts and ends among passage tokens;
the answer to a question is the best span over all its windows. Same procedure as run_qa.py of
Hugging Face and run_squad.py of BERT, with array arithmetic instead of loops.

Shapes: F windows, S sequence length, K starts (ends) tried in a window, C candidates.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np
import numpy.typing as npt
import torch

from lightning_ipu_bert.data.feature_columns import Features, flat_column
from lightning_ipu_bert.data.logits import FloatArray, IntArray, Logits
from lightning_ipu_bert.data.questions import QuestionSet

WINDOWS_PER_CHUNK = 1024
"""Limits the memory of the K x K scores."""


class AnswerRules(NamedTuple):
    """Rules for the spans that can be answers."""

    max_answer_length: int = 30
    """Maximum number of tokens of an answer."""
    n_best: int = 20
    """Number of starts and ends per window, and of candidates per question."""
    version_2: bool = False
    """Whether the empty answer is a candidate (unanswerable questions)."""
    null_score_threshold: float = 0.0
    """The answer is empty if its score exceeds that of the best span by more than this (logits)."""


class Windows(NamedTuple):
    """Positions of passage tokens in the windows of a split."""

    question: IntArray
    """[F]: index of the question."""
    context_start: IntArray
    """[F]: position of the first passage token."""
    passage_counts: IntArray
    """[F]: number of passage tokens."""
    firsts: IntArray
    """[F]: index of the first passage token in the two arrays below."""
    char_starts: IntArray
    """First characters of the passage tokens of all windows, concatenated."""
    char_ends: IntArray
    """Ends of the passage tokens of all windows (exclusive)."""

    @classmethod
    def of(cls, features: Features) -> Windows:
        """Return the windows of features."""
        rows = features.data.column("offset_starts").combine_chunks()
        counts = np.asarray(rows.value_lengths().to_numpy(zero_copy_only=False), np.int64)
        return cls(
            flat_column(features, "question"),
            flat_column(features, "context_start"),
            counts,
            np.cumsum(counts) - counts,
            flat_column(features, "offset_starts"),
            flat_column(features, "offset_ends"),
        )


class Answers(NamedTuple):
    """The candidates of every question, best first, concatenated over questions."""

    question: IntArray
    """[C]: index of the question."""
    char_start: IntArray
    """[C]: first character in the passage."""
    char_end: IntArray
    """[C]: end in the passage (exclusive); equal to `char_start` for the empty answer."""
    score: FloatArray
    """[C]: sum of start and end logit."""
    probability: FloatArray
    """[C]: softmax of the scores over the question's candidates."""

    def texts(self, question_set: QuestionSet) -> Dict[str, str]:
        """Return the best answer by question id, as scored by the official script."""
        best = np.unique(self.question, return_index=True)[1]
        columns = (self.question[best], self.char_start[best], self.char_end[best])
        result: Dict[str, str] = {}
        for q, start, end in zip(*(column.tolist() for column in columns)):
            question = question_set.questions[q]
            result[question.id] = question_set.passage_of(question)[start:end]
        return result

    def n_best(self, question_set: QuestionSet) -> Dict[str, List[Dict[str, object]]]:
        """Return the candidates by question id, with score, probability, start and end."""
        firsts, counts = np.unique(self.question, return_index=True, return_counts=True)[1:]
        rows = zip(*(column.tolist() for column in self[1:]))
        result: Dict[str, List[Dict[str, object]]] = {}
        for asked, count in zip(self.question[firsts].tolist(), counts.tolist()):
            question = question_set.questions[asked]
            passage = question_set.passage_of(question)
            result[question.id] = [
                {"text": passage[a:b], "score": score, "probability": p, "start": a, "end": b}
                for a, b, score, p in islice(rows, count)
            ]
        return result


def decode(logits: Logits, windows: Windows, rules: AnswerRules) -> Answers:
    """Decode logits into ranked answers, over all windows of a question.

    Args:
        logits: Start and end logits of windows, sorted by feature; windows may be missing.
        windows: The windows of the split.
        rules: Rules for answers.

    Returns:
        Up to `n_best` candidates of each question that has a window in `logits`, and with
        `version_2` the empty answer; only the empty answer if no span is valid.

    Source:
        Null answer: Devlin et al., BERT (arXiv:1810.04805), section 4.3; its score is the minimum
        over the windows, as in BERT's run_squad.py.
    """
    chunks = [
        _window_candidates(logits.part(i, i + WINDOWS_PER_CHUNK), windows, rules)
        for i in range(0, len(logits.features), WINDOWS_PER_CHUNK)
    ]
    chunks.append(_empty_answers(logits, windows))
    return _rank(_Candidates(*(np.concatenate(column) for column in zip(*chunks))), rules)


class _Candidates(NamedTuple):
    """Spans of all questions in any order; see `Answers` for the fields."""

    question: IntArray
    char_start: IntArray
    char_end: IntArray
    score: FloatArray

    def take(self, which: npt.NDArray[Any]) -> _Candidates:
        return _Candidates(*(column[which] for column in self))


def _window_candidates(logits: Logits, windows: Windows, rules: AnswerRules) -> _Candidates:
    """Return the best spans of every window."""
    rows = logits.features
    first = windows.context_start[rows].astype(np.int16)[:, None]
    last = first + windows.passage_counts[rows].astype(np.int16)[:, None]
    position = np.arange(logits.starts.shape[1], dtype=np.int16)
    in_passage = (position >= first) & (position < last)
    start_score, start = _top(np.where(in_passage, logits.starts, -np.inf), rules.n_best)
    end_score, end = _top(np.where(in_passage, logits.ends, -np.inf), rules.n_best)

    score = start_score[:, :, None] + end_score[:, None, :]  # [F, K, K]
    length = end[:, None, :] - start[:, :, None]  # less one
    np.copyto(score, -np.inf, where=(length < 0) | (length >= rules.max_answer_length))
    score = score.reshape(len(rows), -1)
    # Each window's best in any order, ties included; `_rank` sorts and cuts.
    kept = min(rules.n_best, score.shape[1])
    limit = np.partition(score, -kept, axis=1)[:, -kept, None]
    chosen = np.flatnonzero(score >= np.maximum(limit, np.finfo(np.float32).min))
    window, pair = np.divmod(chosen, score.shape[1])

    token = (windows.firsts - windows.context_start)[rows[window]]
    tried = end.shape[1]
    return _Candidates(
        windows.question[rows[window]],
        windows.char_starts[token + start[window, pair // tried]],
        windows.char_ends[token + end[window, pair % tried]],
        score[window, pair],
    )


def _top(values: npt.NDArray[Any], count: int) -> Tuple[FloatArray, IntArray]:
    """Return the `count` largest values of each row in descending order, and their indices."""
    array = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    top = torch.topk(array, min(count, array.shape[1]), dim=1)
    return top.values.numpy(), top.indices.numpy().astype(np.int16)


def _empty_answers(logits: Logits, windows: Windows) -> _Candidates:
    """Return the empty answers; their score is the minimum of [CLS] over the windows."""
    asked, group = np.unique(windows.question[logits.features], return_inverse=True)
    null = np.full(len(asked), np.inf, np.float32)
    if len(asked):
        np.minimum.at(null, group, logits.starts[:, 0] + logits.ends[:, 0])
    nowhere = np.zeros(len(asked), np.int64)
    return _Candidates(asked, nowhere, nowhere, null)


def _sort_key(question: IntArray, worth: FloatArray) -> IntArray:
    """Return an integer key that sorts by question, then by descending worth.

    Equivalent to `np.lexsort((-worth, question))` in a tenth of the time: candidates are almost
    sorted by question, which a stable sort with a single key exploits.
    """
    bits = (-worth).view(np.int32)  # IEEE 754: ordered as integers, the negative ones backwards
    return (question << 32) + (bits ^ ((bits >> 31) & 0x7FFFFFFF))


def _rank(candidates: _Candidates, rules: AnswerRules) -> Answers:
    """Sort the candidates of every question, keep `n_best`, and compute probabilities."""
    empty = candidates.char_start == candidates.char_end
    # Without version_2 the empty answer is used only if no span is valid.
    handicap = np.float32(rules.null_score_threshold if rules.version_2 else np.inf)
    worth = candidates.score - np.where(empty, handicap, np.float32(0))
    order = np.argsort(_sort_key(candidates.question, worth), kind="stable")
    candidates, empty = candidates.take(order), empty[order]
    firsts, counts = np.unique(candidates.question, return_index=True, return_counts=True)[1:]
    rank = np.arange(len(empty)) - np.repeat(firsts, counts)
    kept = np.where(empty, rules.version_2 | (rank == 0), rank < rules.n_best)
    candidates = candidates.take(kept)

    if not len(candidates.score):
        return Answers(*candidates, candidates.score)
    firsts, counts = np.unique(candidates.question, return_index=True, return_counts=True)[1:]
    best = np.maximum.reduceat(candidates.score, firsts)
    weight = np.exp(candidates.score - np.repeat(best, counts))
    total = np.add.reduceat(weight, firsts)
    return Answers(*candidates, weight / np.repeat(total, counts))
