"""Exact match and F1 of a predictions.json, by the definition of the official SQuAD script.

    python scripts/score_predictions.py validation.json predictions.json

Rajpurkar et al. 2016 (arXiv:1606.05250), section 6.1, and for questions without an answer
Rajpurkar et al. 2018 (arXiv:1806.03822): lower case, without punctuation, articles and surplus
white space; the best score over a question's answers; the mean over all questions, in percent.
Stands alone: it shares no code with the package whose predictions it scores.
"""

from __future__ import annotations

import collections
import json
import re
import string
import sys
from typing import Any, Dict, Iterator, List, Tuple


def normalize(text: str) -> List[str]:
    """Return the words of an answer that count."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact(prediction: str, answer: str) -> float:
    """Return 1 where both have the same words in the same order, else 0."""
    return float(normalize(prediction) == normalize(answer))


def f1(prediction: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall over words, in 0..1."""
    said, right = normalize(prediction), normalize(answer)
    if not said or not right:
        return float(said == right)
    common = sum((collections.Counter(said) & collections.Counter(right)).values())
    return 2 * common / (len(said) + len(right))


def questions(data: Dict[str, Any]) -> Iterator[Tuple[str, List[str]]]:
    """Yield id and right answers of each question; the empty answer where there is none."""
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                texts = [answer["text"] for answer in qa["answers"]]
                yield qa["id"], [text for text in texts if normalize(text)] or [""]


def score(data: Dict[str, Any], predictions: Dict[str, str]) -> Dict[str, float]:
    """Return exact match and F1 in percent; a question without a prediction counts 0."""
    matches, overlaps, total = 0.0, 0.0, 0
    for question, answers in questions(data):
        total += 1
        if question in predictions:
            matches += max(exact(predictions[question], answer) for answer in answers)
            overlaps += max(f1(predictions[question], answer) for answer in answers)
    return {"exact_match": 100 * matches / total, "f1": 100 * overlaps / total, "total": total}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python scripts/score_predictions.py DATA.json PREDICTIONS.json")
    with open(sys.argv[1], encoding="utf8") as f, open(sys.argv[2], encoding="utf8") as g:
        print(json.dumps(score(json.load(f), json.load(g))))
