"""Exact match and F1 by the definition of the official SQuAD script.

Rajpurkar et al. 2016 (arXiv:1606.05250), section 6.1, and for questions without an answer
Rajpurkar et al. 2018 (arXiv:1806.03822): lower case, without punctuation, articles and extra white
space; the best score over the answers to a question; the mean over all questions, in percent.
Shares no code with the package.
"""

from __future__ import annotations

import collections
import re
import string
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
