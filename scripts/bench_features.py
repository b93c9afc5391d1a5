"""JSON to cached features: ours against the usual way, on the same questions.

    python scripts/bench_features.py --train_file train.json --tokenizer FOLDER [--pairs 3]

The file is repeated until it holds 87,599 questions (SQuAD v1.1's training set), every copy with
passages and questions of its own, so that no trick with repeated text helps. The usual way is
`datasets.map(batched=True, num_proc=1)` with a Python loop over each feature's offsets, as in
run_qa.py, and its cache written, too. Each run is a process of its own with an empty cache; peak
memory is that process's. Both sides must give the same features.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

QUESTIONS = 87_599
MAX_LENGTH, DOC_STRIDE = 384, 128
COLUMNS = ("input_ids", "token_type_ids", "start_positions", "end_positions")


def enlarge(source: Path, target: Path) -> int:
    """Repeat a SQuAD file until it holds `QUESTIONS` questions; return their number.

    Every copy's passages end in a sentence of their own, and its questions begin with a word of
    their own, so that nothing is the same text twice. Answers stay where they are.
    """
    articles = json.loads(source.read_text("utf8"))["data"]
    data: List[Dict[str, Any]] = []
    count = copy = 0
    while count < QUESTIONS:
        for article in articles:
            paragraphs = []
            for paragraph in article["paragraphs"]:
                qas = [
                    {**qa, "id": f"{copy}-{qa['id']}", "question": f"Copy{copy}: {qa['question']}"}
                    for qa in paragraph["qas"][: QUESTIONS - count]
                ]
                count += len(qas)
                context = f"{paragraph['context']} This is copy number {copy}."
                paragraphs.append({"context": context, "qas": qas})
            data.append({"title": article["title"], "paragraphs": paragraphs})
        copy += 1
    target.write_text(json.dumps({"version": "1.1", "data": data}), "utf8")
    return count


def ours(file: str, tokenizer_path: str, cache: str) -> Any:
    """Build and cache features with the package."""
    from transformers import AutoTokenizer

    from lightning_ipu_bert.data.feature_cache import cached_features
    from lightning_ipu_bert.data.formats import read_files
    from lightning_ipu_bert.data.records import Rules
    from lightning_ipu_bert.data.settings import Windowing

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    begin = time.perf_counter()
    question_set = read_files([file], Rules())
    windowing = Windowing(MAX_LENGTH, DOC_STRIDE)
    features = cached_features(question_set, tokenizer, windowing, Path(cache))
    return features, time.perf_counter() - begin


def usual(file: str, tokenizer_path: str, cache: str) -> Any:
    """Build and cache features as run_qa.py and its relatives do."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    begin = time.perf_counter()
    examples: Dict[str, List[Any]] = {"id": [], "question": [], "context": [], "answers": []}
    for article in json.loads(Path(file).read_text("utf8"))["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                examples["id"].append(qa["id"])
                examples["question"].append(qa["question"])
                examples["context"].append(paragraph["context"])
                starts = [answer["answer_start"] for answer in qa["answers"]]
                texts = [answer["text"] for answer in qa["answers"]]
                examples["answers"].append({"text": texts, "answer_start": starts})

    def prepare(batch: Dict[str, List[Any]]) -> Dict[str, List[Any]]:
        tokenized = tokenizer(
            [question.lstrip() for question in batch["question"]],
            batch["context"],
            truncation="only_second",
            max_length=MAX_LENGTH,
            stride=DOC_STRIDE,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=False,  # the usual script pads here, which takes it twice as long
        )
        example_of = tokenized.pop("overflow_to_sample_mapping")
        offset_mapping = tokenized.pop("offset_mapping")
        tokenized["start_positions"], tokenized["end_positions"] = [], []
        for i, offsets in enumerate(offset_mapping):
            answer = batch["answers"][example_of[i]]
            start_char = answer["answer_start"][0]
            end_char = start_char + len(answer["text"][0])
            sequence_ids = tokenized.sequence_ids(i)
            first = 0
            while sequence_ids[first] != 1:
                first += 1
            last = len(sequence_ids) - 1
            while sequence_ids[last] != 1:
                last -= 1
            if not (offsets[first][0] <= start_char and offsets[last][1] >= end_char):
                tokenized["start_positions"].append(0)
                tokenized["end_positions"].append(0)
                continue
            while first < len(offsets) and offsets[first][0] <= start_char:
                first += 1
            tokenized["start_positions"].append(first - 1)
            while offsets[last][1] >= end_char:
                last -= 1
            tokenized["end_positions"].append(last + 1)
        return dict(tokenized)

    dataset = datasets.Dataset.from_dict(examples)
    features = dataset.map(
        prepare,
        batched=True,
        num_proc=1,
        remove_columns=dataset.column_names,
        cache_file_name=str(Path(cache) / "features.arrow"),
    )
    return features, time.perf_counter() - begin


def digest(features: Any) -> str:
    """Return a hash of the columns that both sides have."""
    import hashlib

    import numpy as np

    sha = hashlib.sha256()
    for name in COLUMNS:
        column = features.data.column(name).combine_chunks()
        values = column.flatten() if "positions" not in name else column
        sha.update(np.asarray(values.to_numpy(zero_copy_only=False), np.int64).tobytes())
    return sha.hexdigest()


def run_in_process(side: str, file: str, tokenizer: str) -> Dict[str, Any]:
    """Run one side in a fresh process with an empty cache and return its figures."""
    with tempfile.TemporaryDirectory() as cache:
        words = [sys.executable, __file__, "--train_file", file, "--tokenizer", tokenizer]
        environment = {**os.environ, "HF_DATASETS_CACHE": cache}
        output = subprocess.run(
            [*words, "--side", side, "--cache", cache],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        ).stdout
    result: Dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train_file", required=True, help="a file in SQuAD's JSON format")
    parser.add_argument("--tokenizer", required=True, help="folder or hub name")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--side", choices=["ours", "usual"], help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        build = ours if options.side == "ours" else usual
        features, seconds = build(options.train_file, options.tokenizer, options.cache)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        figures = {"seconds": seconds, "peak_gib": peak, "features": len(features)}
        print(json.dumps({**figures, "digest": digest(features)}))
        return

    ratios, peaks = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "enlarged.json"
        print(f"{enlarge(Path(options.train_file), file)} questions")
        for pair in range(options.pairs):
            results = [
                run_in_process(side, str(file), options.tokenizer) for side in ("ours", "usual")
            ]
            for side, result in zip(("ours ", "usual"), results):
                print(
                    f"pair {pair}: {side} {result['seconds']:6.1f} s, "
                    f"{result['features']} features, peak {result['peak_gib']:.2f} GiB, "
                    f"digest {result['digest'][:12]}",
                    flush=True,
                )
            if results[0]["digest"] != results[1]["digest"]:
                sys.exit("The features differ.")
            ratios.append(results[1]["seconds"] / results[0]["seconds"])
            peaks.append(results[0]["peak_gib"])
    print(
        f"ratio usual / ours: median {statistics.median(ratios):.1f} "
        f"({min(ratios):.1f} .. {max(ratios):.1f}) over {len(ratios)} pairs; "
        f"our peak memory {max(peaks):.2f} GiB"
    )


if __name__ == "__main__":
    main()
