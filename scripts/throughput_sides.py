"""The sides of bench_throughput.py beside `fit`: each runs in a process of its own.

    python scripts/throughput_sides.py best|compiled|recipe|peak OUT OPTIONS...

best:     the Trainer of Hugging Face as fast as its options make it: batches grouped by length,
          eager attention, fused AdamW.
compiled: the same with torch_compile.
recipe:   the tutorial's: batches padded to 384 tokens, everything else as the Trainer comes.
peak:     the best square product of the type.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

import torch
from bench_hf_trainer import BATCH, MODEL_COLUMNS, InOrderTrainer, arguments, load_model
from transformers import AutoTokenizer, DataCollatorWithPadding
from update_clock import WARM_UP, TrainerClock

from lightning_ipu_bert import SquadDataModule

SIDES: Dict[str, Dict[str, Any]] = {
    "best": {"attention": "eager", "optim": "adamw_torch_fused"},
    "compiled": {"attention": "eager", "optim": "adamw_torch_fused", "torch_compile": True},
    "recipe": {"attention": "sdpa"},
}
SEED = 42
"""Of configs/squad_minilm.yaml: decides the order of the features."""
SIZES = (1024, 1536, 2048, 3072, 4096)


def features_in_order(train_file: str, model: str, updates: int) -> Any:
    """Return the features of the first updates of `fit`, in its order."""
    os.environ["PL_GLOBAL_SEED"] = str(SEED)
    data = SquadDataModule(train_file, tokenizer_name_or_path=model, group_by_length=True)
    data.setup("fit")
    loader = data.train_dataloader()
    assert loader.batch_size is not None
    order: List[int] = list(loader.sampler)[: updates * loader.batch_size]
    return data.split("train").features.select(order)


def train(side: str, out: str, options: Dict[str, Any]) -> None:
    """Train with the Trainer of Hugging Face."""
    settings = dict(SIDES[side])
    model = load_model(options["model"], dropout=True)
    model.set_attn_implementation(settings.pop("attention"))
    updates = WARM_UP + options["updates"]
    features = features_in_order(options["train_file"], options["model"], updates)
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    padding: Dict[str, Any] = {}
    if side == "recipe":
        padding = {"padding": "max_length", "max_length": 384}
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrderTrainer(
            model,
            arguments(folder, bf16=options["bf16"], logging_steps=25, **settings),
            train_dataset=features.select_columns(MODEL_COLUMNS),
            data_collator=DataCollatorWithPadding(tokenizer, **padding),
            callbacks=[TrainerClock(out, options["updates"])],
        )
        trainer.train()
    result = json.loads(Path(out).read_text("utf8"))
    lengths = [len(ids) for ids in features["input_ids"]]
    result["lengths"] = [lengths[i : i + BATCH] for i in range(0, len(lengths), BATCH)]
    Path(out).write_text(json.dumps(result), "utf8")


def peak(out: str, bf16: bool) -> None:
    """Write the FLOP/s of the best square product."""
    best = 0.0
    for size in SIZES:
        matrix = torch.randn(size, size, dtype=torch.bfloat16 if bf16 else torch.float32)
        times = []
        for _ in range(9):
            begin = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - begin)
        best = max(best, 2 * size**3 / statistics.median(times[2:]))
    Path(out).write_text(json.dumps(best), "utf8")


if __name__ == "__main__":
    given = json.loads(sys.argv[3])
    if sys.argv[1] == "peak":
        peak(sys.argv[2], given["bf16"])
    else:
        train(sys.argv[1], sys.argv[2], given)
