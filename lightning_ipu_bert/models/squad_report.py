"""The training report of question answering: batch sizes, scores, and a command to try it."""

from __future__ import annotations

import shlex
from typing import Dict, List

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_ipu_bert._compat.lightning import datamodule_of
from lightning_ipu_bert.data.squad import SquadDataModule
from lightning_ipu_bert.training.report import BatchSize, TrainingReport

LONGEST_EXAMPLE = 600
"""Maximum length of a printed passage in characters."""


def squad_report() -> TrainingReport:
    """Return the report callback for question answering."""
    return TrainingReport(size_of, ("val/exact_match", "val/f1"), ask_hint)


def size_of(batch: Dict[str, Tensor]) -> BatchSize:
    """Return the number of examples and tokens of a batch, without padding."""
    return BatchSize(len(batch["input_ids"]), batch["attention_mask"].sum())


def ask_hint(trainer: Trainer, path: str) -> List[str]:
    """Return a command that asks a checkpoint a question of the validation split."""
    data, question, passage = datamodule_of(trainer), "...", "..."
    if isinstance(data, SquadDataModule) and data.splits.sources.has("validation"):
        question_set = data.split("validation").question_set
        first = question_set.questions[0]
        if len(question_set.passage_of(first)) <= LONGEST_EXAMPLE:
            question, passage = first.text, question_set.passage_of(first)
    words = ["--model", path, "--question", question, "--context", passage]
    command = "python -m lightning_ipu_bert ask " + " ".join(shlex.quote(word) for word in words)
    return [f"Ask it:\n  {command}"]
