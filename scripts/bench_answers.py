"""Logits to answers: ours against the usual loop over examples, on the same logits.

    python scripts/bench_answers.py --validation_file validation.json --tokenizer FOLDER \
        [--logits logits.npz] [--pairs 7]

Without `--logits` (written by `predict --predictions.write_logits true`) the logits are random with
the peaks of a trained model: the right span and some others stand out. Both sides turn the same
arrays into the same answers and n-best lists; the ratio is the median over interleaved pairs.
Measured twice: the usual loop reads its windows from the data set of features, as run_qa.py does,
and from a list in memory, which nobody does but which leaves nothing but the loop itself.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from transformers import AutoTokenizer

from lightning_ipu_bert.data.answers import AnswerRules, Windows, decode
from lightning_ipu_bert.data.feature_cache import cached_features, flat_column
from lightning_ipu_bert.data.formats import read_files
from lightning_ipu_bert.data.logits import Logits
from lightning_ipu_bert.data.questions import QuestionSet
from lightning_ipu_bert.data.records import Rules
from lightning_ipu_bert.data.settings import Windowing


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
        begin, behind = best[0]["offsets"]
        texts[question.id] = context[begin:behind]
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
    others = set(features.column_names) - {"input_ids", "token_type_ids", "question"}
    stored = features.map(with_offset_mapping, remove_columns=list(others))
    rows = {"in a data set": stored, "in memory": list(stored)}
    masked = passage_logits(rows["in memory"], logits)
    rules = AnswerRules()

    def ours(ranked: bool) -> Tuple[Dict[str, str], Dict[str, List[Dict[str, Any]]]]:
        answers = decode(logits, Windows.of(features), rules)
        return answers.texts(question_set), answers.n_best(question_set) if ranked else {}

    for (place, windows), ranked in itertools.product(rows.items(), (False, True)):
        ratios = []
        for _ in range(options.pairs):
            gc.collect()  # and none while it is measured, as in timeit
            gc.disable()
            begin = time.perf_counter()
            our_texts, our_n_best = ours(ranked)
            middle = time.perf_counter()
            texts, n_best = usual_loop(question_set, windows, masked, rules, ranked)
            ratios.append((time.perf_counter() - middle) / (middle - begin))
            gc.enable()
        print(
            f"windows {place}, answers{' and ranked candidates' if ranked else ''}: "
            f"usual loop / ours: median {statistics.median(ratios):.1f} "
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
