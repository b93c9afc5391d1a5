"""Answers: from start and end logits to text, for all questions at once.

Each window proposes its best spans, made of its `n_best` best starts and ends among the passage's
tokens; a question's answer is the best span over all its windows. Follows the usual procedure
(Hugging Face's run_qa.py, after BERT's run_squad.py) as array arithmetic instead of a loop.

Letters in shapes: F windows, S sequence length, K starts (ends) tried in a window, C candidates.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, NamedTuple, Tuple

import numpy as np
import numpy.typing as npt
import torch

from lightning_ipu_bert.data.feature_cache import flat_column
from lightning_ipu_bert.data.questions import QuestionSet

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

WINDOWS_PER_CHUNK = 1024
"""Bounds the memory of the K x K scores."""


class AnswerRules(NamedTuple):
    """Which spans may be an answer."""

    max_answer_length: int = 30
    """Tokens of the longest answer."""
    n_best: int = 20
    """Starts and ends tried in a window, and candidates kept for a question."""
    version_2: bool = False
    """Some questions have no answer: the empty text competes."""
    null_score_threshold: float = 0.0
    """The answer is empty where its score beats the best span's by more than this (logits)."""


class Logits(NamedTuple):
    """What a model says of some windows, in any order."""

    features: IntArray
    """[F]: index of each window's feature."""
    starts: FloatArray
    """[F, S]"""
    ends: FloatArray
    """[F, S]"""

    def part(self, first: int, behind: int) -> Logits:
        """Return the windows `first` to `behind` - 1."""
        rows = slice(first, behind)
        return Logits(self.features[rows], self.starts[rows], self.ends[rows])


class Windows(NamedTuple):
    """Where the passage's tokens lie in the windows of a split."""

    question: IntArray
    """[F]: index of the question."""
    context_start: IntArray
    """[F]: position of the first passage token."""
    passage_counts: IntArray
    """[F]: passage tokens."""
    firsts: IntArray
    """[F]: index of the window's first passage token in the two rows below."""
    char_starts: IntArray
    """Characters of all windows' passage tokens, one window after the other."""
    char_ends: IntArray
    """The characters behind them."""

    @classmethod
    def of(cls, features: Any) -> Windows:
        """Take the columns that decoding needs from a data set of features."""
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
    """The candidates of every question, best first, question by question."""

    question: IntArray
    """[C]: index of the question."""
    char_start: IntArray
    """[C]: first character in the passage."""
    char_end: IntArray
    """[C]: character behind the last; equal to `char_start` for the empty answer."""
    score: FloatArray
    """[C]: sum of start and end logit."""
    probability: FloatArray
    """[C]: softmax of the scores over the question's candidates."""

    def texts(self, question_set: QuestionSet) -> Dict[str, str]:
        """Return the best answer of each question under its id: what the official script scores."""
        best = np.unique(self.question, return_index=True)[1]
        columns = (self.question[best], self.char_start[best], self.char_end[best])
        result: Dict[str, str] = {}
        for q, start, end in zip(*(column.tolist() for column in columns)):
            question = question_set.questions[q]
            result[question.id] = question_set.passage_of(question)[start:end]
        return result

    def n_best(self, question_set: QuestionSet) -> Dict[str, List[Dict[str, Any]]]:
        """Return each question's candidates under its id, with score, probability and place."""
        firsts = np.unique(self.question, return_index=True)[1].tolist()
        columns = [column.tolist() for column in self]
        result: Dict[str, List[Dict[str, Any]]] = {}
        for part in (slice(*bounds) for bounds in zip(firsts, [*firsts[1:], len(self.question)])):
            asked, starts, ends, scores, probabilities = (column[part] for column in columns)
            question = question_set.questions[asked[0]]
            passage = question_set.passage_of(question)
            result[question.id] = [
                {"text": passage[a:b], "score": score, "probability": p, "start": a, "end": b}
                for a, b, score, p in zip(starts, ends, scores, probabilities)
            ]
        return result


def join_logits(parts: Iterable[Tuple[Any, Any, Any]]) -> Logits:
    """Put the logits of batches of different length into one array, each window once.

    Args:
        parts: Feature indices [B], start logits [B, S] and end logits [B, S] of each batch. A
            window that came twice (samplers of several processes repeat some) counts once.
    """
    batches = [tuple(np.asarray(x) for x in part) for part in parts]
    width = max((starts.shape[1] for _, starts, _ in batches), default=0)

    def stack(which: int) -> FloatArray:
        padded = [
            np.pad(b[which], ((0, 0), (0, width - b[which].shape[1])), constant_values=-np.inf)
            for b in batches
        ]
        return np.concatenate(padded).astype(np.float32) if padded else np.zeros((0, 0), np.float32)

    features = np.concatenate([b[0] for b in batches]) if batches else np.zeros(0)
    unique, where = np.unique(features.astype(np.int64), return_index=True)
    return Logits(unique, stack(1)[where], stack(2)[where])


def decode(logits: Logits, windows: Windows, rules: AnswerRules) -> Answers:
    """Turn logits into ranked answers, all windows of a question merged.

    Args:
        logits: Start and end logits of windows, sorted by feature; other windows are left out.
        windows: Geometry of the split's windows.
        rules: Which spans may be an answer.

    Returns:
        Up to `n_best` candidates of each question that has a window in `logits`, and with
        `version_2` the empty one besides; only the empty one where no span is allowed.

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
    first = windows.context_start[rows][:, None]
    position = np.arange(logits.starts.shape[1])[None]
    in_passage = (position >= first) & (position < first + windows.passage_counts[rows][:, None])
    start_score, start = _top(np.where(in_passage, logits.starts, -np.inf), rules.n_best)
    end_score, end = _top(np.where(in_passage, logits.ends, -np.inf), rules.n_best)

    score = start_score[:, :, None] + end_score[:, None, :]  # [F, K, K]
    length = end[:, None, :] - start[:, :, None]  # less one
    score[(length < 0) | (length >= rules.max_answer_length)] = -np.inf
    score, pair = _top(score.reshape(len(rows), -1), rules.n_best)  # [F, n_best]

    window, column = np.nonzero(np.isfinite(score))
    pair = pair[window, column]
    token = windows.firsts[rows[window]] - windows.context_start[rows[window]]
    tried = end.shape[1]
    return _Candidates(
        windows.question[rows[window]],
        windows.char_starts[token + start[window, pair // tried]],
        windows.char_ends[token + end[window, pair % tried]],
        score[window, column],
    )


def _top(values: npt.NDArray[Any], count: int) -> Tuple[FloatArray, IntArray]:
    """Return the `count` largest numbers of each row, largest first, and where they stand."""
    array = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    top = torch.topk(array, min(count, array.shape[1]), dim=1)
    return top.values.numpy(), top.indices.numpy()


def _empty_answers(logits: Logits, windows: Windows) -> _Candidates:
    """Return the empty answer of every question: it scores the lowest [CLS] over the windows."""
    asked, group = np.unique(windows.question[logits.features], return_inverse=True)
    null = np.full(len(asked), np.inf, np.float32)
    if len(asked):
        np.minimum.at(null, group, logits.starts[:, 0] + logits.ends[:, 0])
    nowhere = np.zeros(len(asked), np.int64)
    return _Candidates(asked, nowhere, nowhere, null)


def _rank(candidates: _Candidates, rules: AnswerRules) -> Answers:
    empty = candidates.char_start == candidates.char_end
    # Without version_2 the empty answer is the last resort, where no span is allowed at all.
    handicap = rules.null_score_threshold if rules.version_2 else np.inf
    order = np.lexsort((-(candidates.score - np.where(empty, handicap, 0)), candidates.question))
    candidates, empty = candidates.take(order), empty[order]
    firsts, group, counts = np.unique(
        candidates.question, return_index=True, return_inverse=True, return_counts=True
    )[1:]
    rank = np.arange(len(empty)) - np.repeat(firsts, counts)
    kept = np.where(empty, rules.version_2 | (rank == 0), rank < rules.n_best)

    score = np.where(kept, candidates.score, -np.inf)
    if len(score):
        weight = np.exp(score - np.maximum.reduceat(score, firsts)[group])
        score = weight / np.add.reduceat(weight, firsts)[group]
    return Answers(*candidates.take(kept), score[kept].astype(np.float32))
