"""Exact match and F1 of a predictions.json, by the definition of the official SQuAD script.

    python scripts/score_predictions.py validation.json predictions.json

Shares no code with the package whose predictions it scores: see tests/official_scores.py.
"""

from __future__ import annotations

import json
import sys

import tests_path  # noqa: F401
from official_scores import score

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python scripts/score_predictions.py DATA.json PREDICTIONS.json")
    with open(sys.argv[1], encoding="utf8") as f, open(sys.argv[2], encoding="utf8") as g:
        print(json.dumps(score(json.load(f), json.load(g))))
