"""Logits to answers: ours against the usual loop over examples, on the same logits.

    python scripts/bench_answers.py --validation_file validation.json --tokenizer FOLDER \
        [--logits logits.npz] [--pairs 7]

Without `--logits` (written by `predict --predictions.write_logits true`) the logits are random with
the peaks of a trained model: the right span and some others stand out. Both sides turn the same
arrays into the same answers and n-best lists; the ratio is the median over interleaved pairs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
from transformers import AutoTokenizer

from lightning_ipu_bert.data.answers import AnswerRules, Logits, Windows, decode
from lightning_ipu_bert.data.feature_cache import cached_features, flat_column
from lightning_ipu_bert.data.features import Windowing
from lightning_ipu_bert.data.questions import QuestionSet
from lightning_ipu_bert.data.readers import Rules, read_files


def usual_loop(
    question_set: QuestionSet,
    rows: List[Dict[str, Any]],
    logits: Logits,
    rules: AnswerRules,
    ranked: bool = True,
) -> Tuple[Dict[str, str], Dict[str, List[Dict[str, Any]]]]:
    """Decode by the usual procedure, as run_qa.py and its relatives have it.

    For every example, every window, every pair of the best starts and ends; the window's offsets
    are None outside the passage. One thing differs: the best starts and ends are sought among the
    passage's tokens. The usual loop seeks them among all positions and drops those outside the
    passage later, so that its answers depend on how a batch was padded.
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
            outside = [offset is None for offset in offsets]
            outside += [True] * (len(start_logits) - len(outside))
            start_logits = np.where(outside, -np.inf, start_logits)
            end_logits = np.where(outside, -np.inf, end_logits)
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
        begin, behind = best[0]["offsets"]
        texts[question.id] = context[begin:behind]
        if not ranked:
            continue
        scores = np.array([c["score"] for c in best])
        weights = np.exp(scores - scores.max())
        n_best[question.id] = [
            {
                "text": context[c["offsets"][0] : c["offsets"][1]],
                "score": float(c["score"]),
                "probability": float(probability),
            }
            for c, probability in zip(best, weights / weights.sum())
        ]
    return texts, n_best


def with_offset_mapping(row: Dict[str, Any]) -> Dict[str, Any]:
    """Give a feature the column that the usual loop reads: characters, or None off the passage."""
    spans = list(zip(row["offset_starts"], row["offset_ends"]))
    mapping = [None] * row["context_start"] + spans + [None]
    return {"question": row["question"], "offset_mapping": mapping}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--logits", help="logits.npz of a predict run over the same file")
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()

    question_set = read_files([options.validation_file], Rules())
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    features = cached_features(question_set, tokenizer, Windowing(), None)
    if options.logits:
        saved = np.load(Path(options.logits))
        logits = Logits(saved["features"], saved["start_logits"], saved["end_logits"])
    else:
        logits = imitated_logits(features)
    rows = [with_offset_mapping(row) for row in features]
    rules = AnswerRules()

    def ours(ranked: bool) -> Tuple[Dict[str, str], Dict[str, List[Dict[str, Any]]]]:
        answers = decode(logits, Windows.of(features), rules)
        return answers.texts(question_set), answers.n_best(question_set) if ranked else {}

    for ranked, name in ((False, "answers"), (True, "answers and ranked candidates")):
        ratios = []
        for _ in range(options.pairs):
            begin = time.perf_counter()
            our_texts, our_n_best = ours(ranked)
            middle = time.perf_counter()
            texts, n_best = usual_loop(question_set, rows, logits, rules, ranked)
            ratios.append((time.perf_counter() - middle) / (middle - begin))
        print(
            f"{name}: usual loop / ours: median {statistics.median(ratios):.1f} "
            f"({min(ratios):.1f} .. {max(ratios):.1f}) over {len(ratios)} pairs"
        )
    same = sum(our_texts[i] == text for i, text in texts.items())
    close = sum(
        math.isclose(our_n_best[i][k]["score"], c["score"], rel_tol=1e-5)
        for i, candidates in n_best.items()
        for k, c in enumerate(candidates)
    )
    print(f"same answers: {same} of {len(texts)}")
    print(f"same scores of candidates: {close} of {sum(map(len, n_best.values()))}")


if __name__ == "__main__":
    main()
