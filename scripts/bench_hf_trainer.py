"""The same fine-tuning by a plain Hugging Face Trainer and by this package, side by side.

    python scripts/bench_hf_trainer.py parity --train_file T --validation_file V --model M
    python scripts/bench_hf_trainer.py full   --train_file T --validation_file V --model M
    python scripts/bench_hf_trainer.py speed  --train_file T --validation_file V --model M

parity: 20 updates on identical batches, float32, no dropout: the largest difference of losses.
full:   the full run of the Trainer (2 epochs), then exact match and F1 of its predictions. Ours is
        `python -m lightning_ipu_bert fit --config configs/squad_minilm.yaml`.
speed:  both train blocks of updates on the same batches in turn; the median ratio of their times.

The recipe is that of configs/squad_minilm.yaml: batch 16, learning rate 1e-4, linear schedule with
10 % warm-up, weight decay 0.01, clipping 1.0, dropout, bf16, batches grouped by length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Sized

import lightning.pytorch as pl
import numpy as np
import tests_path  # noqa: F401
import torch
from official_scores import score
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from typing_extensions import override

from lightning_ipu_bert.data.answers import AnswerRules, Windows, decode
from lightning_ipu_bert.data.feature_cache import cached_features
from lightning_ipu_bert.data.formats import read_files
from lightning_ipu_bert.data.loaders import Batch, Collator
from lightning_ipu_bert.data.logits import join_logits
from lightning_ipu_bert.data.records import Rules
from lightning_ipu_bert.data.settings import Windowing
from lightning_ipu_bert.models.question_answering import BertForQuestionAnsweringModule

BATCH = 16
MODEL_COLUMNS = ["input_ids", "token_type_ids", "start_positions", "end_positions"]


class InOrderTrainer(Trainer):
    """A Trainer that takes the examples as they come."""

    @override
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        assert isinstance(self.train_dataset, Sized)
        return SequentialSampler(self.train_dataset)


class RecordingTrainer(InOrderTrainer):
    """Keeps every loss unrounded."""

    losses: List[float]

    @override
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
        return loss


class LossHistory(pl.Callback):
    """Keeps the loss of every batch of a Lightning run."""

    def __init__(self) -> None:
        self.losses: List[float] = []

    @override
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def arguments(folder: str, **changes: Any) -> TrainingArguments:
    """Return the recipe of configs/squad_minilm.yaml in the Trainer's words."""
    recipe: Dict[str, Any] = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 32,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,  # below 1: a share of all updates
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "bf16": True,
        "train_sampling_strategy": "group_by_length",
        "use_cpu": True,
        "seed": 42,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 50,
    }
    return TrainingArguments(folder, **{**recipe, **changes})


def load_model(path: str, dropout: bool) -> BertForQuestionAnswering:
    """Load the checkpoint in float32; the same seed gives the same new head everywhere."""
    torch.manual_seed(42)
    config = BertConfig.from_pretrained(path)
    if not dropout:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return BertForQuestionAnswering.from_pretrained(path, config=config, dtype=torch.float32)


def our_module(path: str, dropout: bool) -> BertForQuestionAnsweringModule:
    """Return our module with the recipe and the very weights of `load_model`."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    module = BertForQuestionAnsweringModule(
        path, {} if dropout else off, learning_rate=1e-4, weight_decay=0.01, warmup_ratio=0.1
    )
    module.load_state_dict(load_model(path, dropout).state_dict())
    return module


def our_trainer(folder: str, **changes: Any) -> pl.Trainer:
    """Return Lightning's Trainer with the recipe."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    recipe = {"accelerator": "cpu", "gradient_clip_val": 1.0, "enable_checkpointing": False}
    return pl.Trainer(default_root_dir=folder, **{**quiet, **recipe, **changes})


def our_loader(features: Any, pad_token_id: int) -> DataLoader[Batch]:
    """Return the features in order, in our batches."""
    return DataLoader(features, BATCH, collate_fn=Collator(pad_token_id))


def load_features(options: argparse.Namespace, split: str) -> Any:
    """Return questions and features of a split; both sides train on these."""
    file = options.train_file if split == "train" else options.validation_file
    question_set = read_files([file], Rules())
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    return question_set, cached_features(question_set, tokenizer, Windowing(), None, split)


def parity(options: argparse.Namespace) -> None:
    """Train 20 updates on identical batches, without dropout, in float32; compare the losses."""
    train = load_features(options, "train")[1].select(range(20 * BATCH))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with tempfile.TemporaryDirectory() as folder:
        theirs = RecordingTrainer(
            load_model(options.model, dropout=False),
            arguments(folder, num_train_epochs=1, bf16=False),
            train_dataset=train.select_columns(MODEL_COLUMNS),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        theirs.losses = []
        theirs.train()
        history = LossHistory()
        ours = our_trainer(folder, max_epochs=1, callbacks=[history])
        ours.fit(
            our_module(options.model, dropout=False), our_loader(train, tokenizer.pad_token_id)
        )
    differences = [abs(a - b) for a, b in zip(theirs.losses, history.losses)]
    for step, (a, b) in enumerate(zip(theirs.losses, history.losses)):
        print(f"update {step:2}: Trainer {a:.6f}, ours {b:.6f}")
    print(f"{len(differences)} updates, largest difference of losses {max(differences):.1e}")


def speed(options: argparse.Namespace) -> None:
    """Train the same blocks of updates with both in turn; print the ratio of their times."""
    block = options.updates * BATCH
    train = load_features(options, "train")[1]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ratios = []
    for pair in range(options.pairs):
        rows = train.select(range(pair * block, (pair + 1) * block))
        with tempfile.TemporaryDirectory() as folder:
            theirs = InOrderTrainer(
                load_model(options.model, dropout=True),
                arguments(folder, num_train_epochs=1, logging_steps=10),
                train_dataset=rows.select_columns(MODEL_COLUMNS),
                data_collator=DataCollatorWithPadding(tokenizer),
            )
            ours = our_trainer(folder, max_epochs=1, precision="bf16-mixed")
            module = our_module(options.model, dropout=True)
            loader = our_loader(rows, tokenizer.pad_token_id)
            begin = time.perf_counter()
            theirs.train()
            middle = time.perf_counter()
            ours.fit(module, loader)
            end = time.perf_counter()
        ratios.append((middle - begin) / (end - middle))
        print(f"pair {pair}: Trainer {middle - begin:.1f} s, ours {end - middle:.1f} s", flush=True)
    print(
        f"speed ours / Trainer: median {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} .. {max(ratios):.3f}) over {len(ratios)} pairs"
    )


def full(options: argparse.Namespace) -> None:
    """Train and predict with the Trainer; print time, speed and scores."""
    _, train = load_features(options, "train")
    question_set, validation = load_features(options, "validation")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            load_model(options.model, dropout=True),
            arguments(folder),
            train_dataset=train.select_columns(MODEL_COLUMNS),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        begin = time.perf_counter()
        result = trainer.train()
        seconds = time.perf_counter() - begin
        # Or the Trainer would group the predictions by length, too, and give them in that order.
        trainer.args.train_sampling_strategy = "random"
        inputs = validation.select_columns(["input_ids", "token_type_ids"])
        predictions = trainer.predict(inputs).predictions
    logits = join_logits([(np.arange(len(validation)), *predictions[:2])])
    texts = decode(logits, Windows.of(validation), AnswerRules()).texts(question_set)
    scores = score(json.loads(Path(options.validation_file).read_text("utf8")), texts)
    print(
        f"Hugging Face Trainer: {seconds:.0f} s for {result.global_step} updates, "
        f"{len(train) * 2 / seconds:.2f} examples/s, mean loss {result.training_loss:.4f}, "
        f"EM {scores['exact_match']:.2f}, F1 {scores['f1']:.2f}"
    )


if __name__ == "__main__":
    modes = {"parity": parity, "full": full, "speed": speed}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mode", choices=list(modes))
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--model", required=True, help="folder or hub name of a BERT")
    parser.add_argument("--pairs", type=int, default=7, help="of blocks, for speed")
    parser.add_argument("--updates", type=int, default=8, help="in a block, for speed")
    options = parser.parse_args()
    modes[options.mode](options)
