"""The same fine-tuning by a plain Hugging Face Trainer and by this package, side by side.

    python scripts/bench_hf_trainer.py parity --train_file T --validation_file V --model M
    python scripts/bench_hf_trainer.py full   --train_file T --validation_file V --model M
    python scripts/bench_hf_trainer.py speed  --train_file T --validation_file V --model M

parity: 20 updates on identical batches, float32, no dropout: the largest difference of losses.
full:   the Trainer's whole run (2 epochs), then exact match and F1 of its predictions. Ours is
        `python -m lightning_ipu_bert fit --config configs/squad_minilm.yaml`.
speed:  both train blocks of updates on the same batches in turn; the median ratio of their times.

The recipe is that of configs/squad_minilm.yaml: batch 16, learning rate 1e-4, linear schedule with
10 % warm-up, weight decay 0.01, clipping 1.0, dropout, bf16, batches grouped by length.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

import torch
from score_predictions import score
from torch.utils.data import SequentialSampler
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lightning_ipu_bert.data.answers import AnswerRules, Windows, decode, join_logits
from lightning_ipu_bert.data.feature_cache import cached_features
from lightning_ipu_bert.data.features import Windowing
from lightning_ipu_bert.data.readers import Rules, read_files

BATCH = 16
MODEL_COLUMNS = ["input_ids", "token_type_ids", "start_positions", "end_positions"]


class InOrderTrainer(Trainer):
    """A Trainer that takes the examples as they come, so that another can take the same."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class History(TrainerCallback):
    """Keeps the loss of every update, and the time of its end."""

    def __init__(self) -> None:
        self.losses: List[float] = []
        self.times: List[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


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


def load_features(options: argparse.Namespace, split: str) -> Any:
    """Return questions and features of a split; both sides train on these."""
    file = options.train_file if split == "train" else options.validation_file
    question_set = read_files([file], Rules())
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    return question_set, cached_features(question_set, tokenizer, Windowing(), None, split)


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
        inputs = validation.select_columns(["input_ids", "token_type_ids"])
        starts, ends = trainer.predict(inputs).predictions[:2]
    logits = join_logits([(range(len(validation)), starts, ends)])
    texts = decode(logits, Windows.of(validation), AnswerRules()).texts(question_set)
    scores = score(json.loads(Path(options.validation_file).read_text("utf8")), texts)
    print(
        f"Hugging Face Trainer: {seconds:.0f} s for {result.global_step} updates, "
        f"{len(train) * 2 / seconds:.2f} examples/s, mean loss {result.training_loss:.4f}, "
        f"EM {scores['exact_match']:.2f}, F1 {scores['f1']:.2f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mode", choices=["full"])
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--model", required=True)
    options = parser.parse_args()
    {"full": full}[options.mode](options)
