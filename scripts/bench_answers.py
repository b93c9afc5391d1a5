"""Logits to answers: ours against the usual loop over examples, on the same logits.

    python scripts/bench_answers.py --validation_file validation.json --tokenizer FOLDER \
        [--logits logits.npz] [--pairs 7]

Without `--logits` (written by `predict --predictions.write_logits true`) the logits are random with
the peaks of a trained model: the right span and some others stand out. Both sides turn the same
arrays into the same answers and n-best lists; the ratio is the median over interleaved pairs.
Measured twice: the usual loop reads its windows from the dataset of features, as run_qa.py does,
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
from typing import Any, Dict, List, Tuple

import numpy as np
import tests_path  # noqa: F401
from answer_loop import imitated_logits, passage_logits, usual_loop, with_offset_mapping
from transformers import AutoTokenizer

from lightning_ipu_bert.data.answers import AnswerRules, Windows, decode
from lightning_ipu_bert.data.feature_cache import cached_features
from lightning_ipu_bert.data.formats import read_files
from lightning_ipu_bert.data.logits import Logits
from lightning_ipu_bert.data.records import Rules
from lightning_ipu_bert.data.settings import Windowing


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
    rows = {"in a dataset": stored, "in memory": list(stored)}
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
