"""Decoding of answers by a loop over examples, as in run_qa.py, and logits to decode."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from lightning_ipu_bert.data.answers import AnswerRules
from lightning_ipu_bert.data.feature_columns import flat_column
from lightning_ipu_bert.data.logits import Logits
from lightning_ipu_bert.data.questions import QuestionSet


def usual_loop(
    question_set: QuestionSet,
    rows: Sequence[Dict[str, Any]],
    logits: Logits,
    rules: AnswerRules,
    ranked: bool = True,
) -> Tuple[Dict[str, str], Dict[str, List[Dict[str, Any]]]]:
    """Decode by the usual procedure, as run_qa.py and its relatives have it.

    For every example, every window, every pair of the best starts and ends; the window's offsets
    are None outside the passage.
    """
    windows_of: Dict[int, List[int]] = {}
    for i, row in enumerate(rows):
        windows_of.setdefault(row["question"], []).append(i)
    texts, n_best = {}, {}
    for q, question in enumerate(question_set.questions):
        context = question_set.passage_of(question)
        candidates = []
        for i in windows_of[q]:
            offsets = rows[i]["offset_mapping"]
            start_logits, end_logits = logits.starts[i], logits.ends[i]
            best_starts = np.argsort(start_logits)[-1 : -rules.n_best - 1 : -1].tolist()
            best_ends = np.argsort(end_logits)[-1 : -rules.n_best - 1 : -1].tolist()
            for start in best_starts:
                for end in best_ends:
                    if start >= len(offsets) or end >= len(offsets):
                        continue
                    if offsets[start] is None or offsets[end] is None:
                        continue
                    if end < start or end - start + 1 > rules.max_answer_length:
                        continue
                    candidates.append(
                        {
                            "offsets": (offsets[start][0], offsets[end][1]),
                            "score": start_logits[start] + end_logits[end],
                            "start_logit": start_logits[start],
                            "end_logit": end_logits[end],
                        }
                    )
        best = sorted(candidates, key=lambda c: c["score"], reverse=True)[: rules.n_best]
        begin, end_of_best = best[0]["offsets"]
        texts[question.id] = context[begin:end_of_best]
        if not ranked:
            continue
        for c in best:
            c["text"] = context[slice(*c.pop("offsets"))]
        scores = np.array([c["score"] for c in best])
        weights = np.exp(scores - scores.max())
        for c, probability in zip(best, weights / weights.sum()):
            c["probability"] = probability
        n_best[question.id] = [
            {k: float(v) if isinstance(v, np.floating) else v for k, v in c.items()} for c in best
        ]
    return texts, n_best


def with_offset_mapping(row: Dict[str, Any]) -> Dict[str, Any]:
    """Give a feature the column that the usual loop reads: characters, or None off the passage."""
    spans = list(zip(row["offset_starts"], row["offset_ends"]))
    mapping = [None] * row["context_start"] + spans + [None]
    return {"question": row["question"], "offset_mapping": mapping}


def passage_logits(rows: Sequence[Dict[str, Any]], logits: Logits) -> Logits:
    """Return the logits with -inf outside the passages, so that both sides seek in the same place.

    The usual loop takes the best starts and ends of all positions and drops those outside the
    passage later: fewer are left, and how many depends on the batch's padding.
    """
    starts, ends = np.full_like(logits.starts, -np.inf), np.full_like(logits.ends, -np.inf)
    for i, row in enumerate(rows):
        passage = [k for k, offset in enumerate(row["offset_mapping"]) if offset is not None]
        starts[i, passage], ends[i, passage] = logits.starts[i, passage], logits.ends[i, passage]
    return Logits(logits.features, starts, ends)


def imitated_logits(features: Any) -> Logits:
    """Noise with a few peaks, one of them at the right span, as trained models give."""
    rng = np.random.default_rng(0)
    count = len(features)
    counts = features.data.column("input_ids").combine_chunks().value_lengths().to_numpy()
    planes = []
    for column in ("start_positions", "end_positions"):
        plane = rng.normal(-6, 2, (count, int(counts.max()))).astype(np.float32)
        for _ in range(3):
            plane[np.arange(count), rng.integers(0, counts)] += rng.normal(6, 2, count)
        plane[np.arange(count), flat_column(features, column)] += rng.normal(10, 3, count)
        planes.append(plane)
    return Logits(np.arange(count), planes[0], planes[1])
