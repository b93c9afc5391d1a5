"""The line with which a fit ends: a command that asks the model it has made."""

from __future__ import annotations

import shlex
from typing import List

from lightning.pytorch import Trainer

from lightning_ipu_bert._compat.lightning import datamodule_of
from lightning_ipu_bert.data.squad import SquadDataModule

LONGEST_EXAMPLE = 600
"""Characters of the longest passage that is printed."""


def ask_hint(trainer: Trainer, path: str) -> List[str]:
    """Return a command line that asks a checkpoint a question of the validation set."""
    data, question, passage = datamodule_of(trainer), "...", "..."
    if isinstance(data, SquadDataModule) and data.splits.sources.has("validation"):
        question_set = data.split("validation").question_set
        first = question_set.questions[0]
        if len(question_set.passage_of(first)) <= LONGEST_EXAMPLE:
            question, passage = first.text, question_set.passage_of(first)
    words = ["--model", path, "--question", question, "--context", passage]
    command = "python -m lightning_ipu_bert ask " + " ".join(shlex.quote(word) for word in words)
    return [f"Ask it:\n  {command}"]
