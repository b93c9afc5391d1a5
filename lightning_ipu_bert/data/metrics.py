"""Exact match and F1 of answers."""

from __future__ import annotations

from typing import Any, Dict, List

from torchmetrics.text import SQuAD

from lightning_ipu_bert.data.questions import QuestionSet


def squad_scores(question_set: QuestionSet, texts: Dict[str, str]) -> Dict[str, float]:
    """Compute exact match and F1 with torchmetrics, as defined by the official script.

    Args:
        question_set: Questions with their answers; those without a prediction are not counted.
        texts: Predicted answers by question id.

    Returns:
        ``exact_match`` and ``f1``, in percent.
    """
    asked = [q for q in question_set.questions if q.id in texts]
    predictions: List[Any] = [{"id": q.id, "prediction_text": texts[q.id]} for q in asked]
    # torchmetrics rejects empty lists: the answer to unanswerable questions is the empty text.
    targets: List[Any] = [
        {
            "id": q.id,
            "answers": {
                "text": [a.text for a in q.answers] or [""],
                "answer_start": [a.start for a in q.answers] or [0],
            },
        }
        for q in asked
    ]
    # Every process holds all predictions, so there is nothing to synchronize.
    metric = SQuAD(sync_on_compute=False)
    metric.update(predictions, targets)
    return {name: float(value) for name, value in metric.compute().items()}
