"""`validate`, from features to scores, beside the Trainer's `predict` and the usual loop.

    python scripts/bench_validation.py --validation_file V --ckpt_path C [--pairs 5]

Both sides evaluate the checkpoint C, in batches of 32: ours in the precision of its training, the
Trainer's in bfloat16 with `--bf16`. Each run is a process of its own; those of a pair follow each
other. The clock starts with features that are ready, and stops with exact match and F1: on the
Trainer's side, decoded by the loop over examples of run_qa.py. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

import lightning.pytorch as pl
import numpy as np
import tests_path  # noqa: F401
from answer_loop import usual_loop, with_offset_mapping
from bench_hf_trainer import arguments, load_features
from bench_throughput import run
from official_scores import score
from transformers import (
    AutoTokenizer,
    BertForQuestionAnswering,
    DataCollatorWithPadding,
    Trainer,
)
from typing_extensions import override

from lightning_ipu_bert.data.answers import AnswerRules
from lightning_ipu_bert.data.logits import join_logits

MODEL_INPUTS = ["input_ids", "token_type_ids"]


class ValidationClock(pl.Callback):
    """Writes the duration and the scores of a validation to a file."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.begin = 0.0

    @override
    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.begin = time.perf_counter()

    @override
    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        seconds = time.perf_counter() - self.begin
        scores = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in SCORES}
        write(self.file, seconds, scores)


SCORES = ("exact_match", "f1")


def write(file: str, seconds: float, scores: Dict[str, float]) -> None:
    """Write what a side found."""
    Path(file).write_text(json.dumps({"seconds": seconds, **scores}), "utf8")


def predict(options: argparse.Namespace) -> None:
    """Evaluate by the Trainer of Hugging Face."""
    question_set, features = load_features(options, "validation")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = BertForQuestionAnswering.from_pretrained(options.model)
    rows = [with_offset_mapping(row) for row in features]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            arguments(folder, bf16=options.bf16, train_sampling_strategy="random"),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        begin = time.perf_counter()
        predictions: Any = trainer.predict(features.select_columns(MODEL_INPUTS)).predictions
        logits = join_logits([(np.arange(len(features)), *predictions[:2])])
        texts, _ = usual_loop(question_set, rows, logits, AnswerRules(), ranked=False)
        found = score(json.loads(Path(options.validation_file).read_text("utf8")), texts)
    write(options.out, time.perf_counter() - begin, {name: found[name] for name in SCORES})


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Let both sides evaluate in turn; print the ratio of their speeds."""
    out, exported = folder / "out.json", folder / "exported"
    ckpt = ["--ckpt_path", options.ckpt_path]
    done = folder / "done.json"
    done.write_text("{}", "utf8")
    run(["-m", "lightning_ipu_bert", "export", *ckpt, "--output_dir", str(exported)], done)
    ours = [
        *("-m", "lightning_ipu_bert", "validate", *ckpt),
        *("--data.validation_file", options.validation_file),
        *("--trainer.default_root_dir", str(folder), "--trainer.devices", "1"),
        *("--trainer.callbacks", "bench_validation.ValidationClock"),
        *("--trainer.callbacks.file", str(out)),
    ]
    given = ["--validation_file", options.validation_file, "--model", str(exported)]
    theirs = [__file__, *given, "--out", str(out), *(["--bf16"] if options.bf16 else [])]
    ratios: List[float] = []
    for pair in range(options.pairs):
        sides = {}
        for name in ("ours", "theirs") if pair % 2 == 0 else ("theirs", "ours"):
            out.unlink(missing_ok=True)
            sides[name] = run(ours if name == "ours" else theirs, out)
        ratios.append(sides["theirs"]["seconds"] / sides["ours"]["seconds"])
        print(f"  pair {pair}: ours {sides['ours']}, Trainer {sides['theirs']}", flush=True)
    print(
        f"validate / Trainer: median {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} .. {max(ratios):.2f}) over {len(ratios)} pairs"
    )


def main() -> None:
    """Compare, or be the side of the Trainer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--ckpt_path", help="a checkpoint of fit")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="as the checkpoint was trained")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.validation_file = str(Path(options.validation_file).resolve())
    if options.out:
        predict(options)
        return
    if not options.ckpt_path:
        sys.exit("--ckpt_path is required")
    options.ckpt_path = str(Path(options.ckpt_path).resolve())
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


if __name__ == "__main__":
    main()
