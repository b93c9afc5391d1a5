"""Writer of predictions: answers, ranked candidates and optionally logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import List, Mapping, Optional, Sequence

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_ipu_bert._compat.lightning import datamodule_of
from lightning_ipu_bert.data.logits import join_logits
from lightning_ipu_bert.data.squad import SquadDataModule
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.files import written_atomically
from lightning_ipu_bert.pipeline.facts import facts_of
from lightning_ipu_bert.training.gather import all_gather_objects


class PredictionWriter(BasePredictionWriter):
    """Writes the answers of `predict` to a folder; files are written atomically.

    ``predictions.json`` is {id: answer}, the input of the official SQuAD script;
    ``nbest_predictions.json`` is {id: [{text, score, probability, start, end}, ...]}, best first,
    with character positions in the passage; ``logits.npz`` has the arrays ``features`` [F],
    ``start_logits`` and ``end_logits`` [F, S].
    """

    def __init__(self, output_dir: Optional[str] = None, write_logits: bool = False) -> None:
        """Create the callback.

        Args:
            output_dir: Output folder; null uses the log folder of the run.
            write_logits: Whether to also write start and end logits.
        """
        super().__init__(write_interval="epoch")
        self.output_dir = output_dir
        self.write_logits = write_logits

    @override
    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Sequence[Tensor]],
        batch_indices: Sequence[object],
    ) -> None:
        """Decode the logits of all batches and write the files."""
        data = datamodule_of(trainer)
        if not isinstance(data, SquadDataModule):
            raise UserError(
                "PredictionWriter requires a SquadDataModule. Pass one as datamodule=..., or "
                "remove the callback."
            )
        folder = Path(self.output_dir or trainer.log_dir or trainer.default_root_dir)
        group = facts_of(trainer).data_group
        parts = [
            part for rank_parts in all_gather_objects(predictions, group) for part in rank_parts
        ]
        if not trainer.is_global_zero:
            return
        question_set = data.split("predict").question_set
        answers = data.answers("predict", parts)
        _write_json(folder / "predictions.json", answers.texts(question_set))
        _write_json(folder / "nbest_predictions.json", answers.n_best(question_set))
        if self.write_logits:
            _write_logits(folder / "logits.npz", parts)
        rank_zero_info(f"Predictions     {folder / 'predictions.json'}")


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    with written_atomically(path) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf8")


def _write_logits(path: Path, parts: List[Sequence[Tensor]]) -> None:
    logits = join_logits(parts)
    with written_atomically(path) as partial, partial.open("wb") as file:
        np.savez(file, features=logits.features, start_logits=logits.starts, end_logits=logits.ends)
