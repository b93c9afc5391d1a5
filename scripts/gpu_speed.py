"""The speeds of check_gpu: BERT-Large on features of at most 384 tokens, in bfloat16."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import torch
from bench_hf_trainer import InOrderTrainer, arguments, our_trainer
from bench_throughput import training_flops
from gpu_checks import Row
from pipeline_sides import BERT_LARGE, MINILM, now
from ranks import run_ranks
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForQuestionAnswering
from update_clock import WARM_UP, LightningClock, TrainerClock

from lightning_ipu_bert import BertForQuestionAnsweringModule
from lightning_ipu_bert.data.loaders import Collator

LENGTH = 384
LENGTHS = (41, 108, 127, 138, 149, 163, 178, 196, 221, 267, 384)
"""Deciles of the lengths of 8,580 features of SQuAD's training data, 384 tokens at most."""
PUBLISHED = (361, 1009)
"""Samples/s of BERT-Large on SQuAD, 384 tokens, on 16 IPUs: the tutorial, and Graphcore's best."""
Feature = Dict[str, Any]


def make_features(count: int, batch: int, vocabulary: int) -> List[Feature]:
    """Return random features with the lengths of SQuAD's, those of similar length together."""
    draw = np.random.default_rng(1)
    deciles = np.linspace(0, 1, len(LENGTHS))
    lengths = np.interp(draw.random(count), deciles, LENGTHS).astype(int)
    groups = [np.sort(lengths[i : i + 50 * batch])[::-1] for i in range(0, count, 50 * batch)]
    batches = np.concatenate(groups)[: count // batch * batch].reshape(-1, batch)
    return [
        {
            "input_ids": draw.integers(vocabulary, size=length).tolist(),
            "token_type_ids": [0] * int(length),
            "start_positions": int(draw.integers(length)),
            "end_positions": int(draw.integers(length)),
            "feature": 0,
        }
        for length in draw.permutation(batches).flatten()
    ]


def ours(size: Dict[str, Any], features: List[Feature], batch: int, out: str) -> None:
    """Train by our module as `fit` does, padded to the longest feature of a batch."""
    module = BertForQuestionAnsweringModule(
        config=size, learning_rate=1e-5, weight_decay=0.01, warmup_ratio=0.1
    )
    rows: Any = features  # a list is a dataset, too
    loader = DataLoader(rows, batch, collate_fn=Collator(0, multiple_of=8))
    updates = len(features) // batch - WARM_UP
    with tempfile.TemporaryDirectory() as folder:
        clock = LightningClock(out, updates)
        changes: Dict[str, Any] = {"accelerator": "auto", "devices": 1, "max_epochs": 1}
        our_trainer(folder, precision="bf16-mixed", callbacks=[clock], **changes).fit(
            module, loader
        )


def theirs(
    size: Dict[str, Any], features: List[Feature], batch: int, out: str, gpus: int, padded: bool
) -> None:
    """Train by the Trainer of Hugging Face: grouped by length with sdpa, or padded to 384."""
    model = BertForQuestionAnswering(BertConfig(**size))
    collator = Collator(0, length=LENGTH if padded else None, multiple_of=8)
    changes = {} if padded else {"optim": "adamw_torch_fused"}
    updates = len(features) // batch - WARM_UP
    with tempfile.TemporaryDirectory() as folder:
        recipe = arguments(
            folder,
            **{**changes, "num_train_epochs": 1, "learning_rate": 1e-5},
            per_device_train_batch_size=batch,
            use_cpu=not gpus,
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = InOrderTrainer(
            model,
            recipe,
            train_dataset=features,
            data_collator=lambda rows: without_number(collator(rows)),
            callbacks=[TrainerClock(out, updates)],
        )
        trainer.train()


def alone(train: Callable[[str], None], out: str) -> None:
    """Let a side train in this process, which the Trainer must not take for a rank of DDP."""
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    warnings.simplefilter("ignore")
    train(out)


def without_number(batch: Dict[str, Any]) -> Dict[str, Any]:
    """Return a batch without the number of the feature, which the model does not take."""
    return {name: value for name, value in batch.items() if name != "feature"}


def check_speed(short: bool, gpus: int) -> List[Row]:
    """Let the sides train in turn; return their ratios."""
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    size = {**MINILM, "num_hidden_layers": 1, **dropout} if short else {**BERT_LARGE, **dropout}
    batch, updates, rounds = (2, 3, 1) if short else (32, 30, 3)
    config = BertConfig(**size)
    features = make_features((WARM_UP + updates) * batch, batch, config.vocab_size)
    sides: Dict[str, Callable[[str], None]] = {
        "ours": lambda out: ours(size, features, batch, out),
        "best": lambda out: theirs(size, features, batch, out, gpus, padded=False),
        "padded": lambda out: theirs(size, features, batch, out, gpus, padded=True),
    }
    seconds: Dict[str, List[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        for _ in range(rounds):
            for name, train in sides.items():
                run_ranks(1, alone, train, str(out), timeout=240)
                seconds[name].append(json.loads(out.read_text("utf8"))["seconds"])
    timed = [len(feature["input_ids"]) for feature in features[WARM_UP * batch :]]
    speed = len(timed) / statistics.median(seconds["ours"])
    flops = training_flops(config, timed) / statistics.median(seconds["ours"])
    share = flops / run_ranks(1, peak_flops, gpus, timeout=240)[0]
    rows = [
        ratio("Trainer at its best", seconds["ours"], seconds["best"], 1.5, short),
        ratio("Trainer padded to 384", seconds["ours"], seconds["padded"], 3.0, short),
    ]
    times = " and ".join(f"{speed / published:.2f} times {published}" for published in PUBLISHED)
    what = f"{speed:.1f} examples/s, {times}, the published samples/s of 16 IPUs"
    if short:
        what = f"{speed:.1f} examples/s of a model of one layer"
    rows.append(Row("speed", what, ""))
    of = "of the best square product, by the products of real tokens"
    rows.append(Row("model FLOP utilization", f"{100 * share:.0f} % {of}", ""))
    return rows


def ratio(name: str, ours: List[float], theirs: List[float], asked: float, short: bool) -> Row:
    """Return the row of a ratio of speeds; shortened, it says nothing."""
    ratios = [b / a for a, b in zip(ours, theirs)]
    median = statistics.median(ratios)
    result = f"{median:.2f} times ({min(ratios):.2f} .. {max(ratios):.2f}, {len(ratios)} pairs)"
    if short:
        return Row(f"fit / {name}", f"{result}; shortened", "")
    return Row(f"fit / {name}", result, f">= {asked}", median >= asked)


def peak_flops(gpus: int) -> float:
    """Return the FLOP/s of the best square product in bfloat16 on this device."""
    device, sizes = ("cuda", (4096, 8192, 16384)) if gpus else ("cpu", (1024, 2048))
    return max(measured_flops(size, device) for size in sizes)


def measured_flops(size: int, device: str) -> float:
    """Return the FLOP/s of a square product."""
    matrix = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(9):
        begin = now()
        matrix @ matrix
        times.append(now() - begin)
    return 2 * size**3 / statistics.median(times[2:])
