"""`SquadDataModule`: SQuAD files or hub datasets as batches of features."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, Mapping, Optional, Tuple, Union

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_ipu_bert.data.answers import AnswerRules, Answers, Windows, decode
from lightning_ipu_bert.data.feature_cache import default_cache_dir
from lightning_ipu_bert.data.feature_table import FeatureTable
from lightning_ipu_bert.data.loaders import Batch, Collator, ResumableDataLoader, TrainingSampler
from lightning_ipu_bert.data.logits import Parts, join_logits
from lightning_ipu_bert.data.metrics import squad_scores
from lightning_ipu_bert.data.positions import limits_evaluation, training_position
from lightning_ipu_bert.data.records import Rules
from lightning_ipu_bert.data.settings import data_rules, settings_of
from lightning_ipu_bert.data.sources import Files, Sources, paths_of
from lightning_ipu_bert.data.splits import SPLITS, Split, Splits
from lightning_ipu_bert.pipeline.facts import facts_of
from lightning_ipu_bert.pipeline.rules import count_rule, enforce


class SquadDataModule(pl.LightningDataModule):
    """LightningDataModule for SQuAD: questions and passages as windows of tokens."""

    def __init__(
        self,
        train_file: Files = None,
        validation_file: Files = None,
        test_file: Files = None,
        predict_file: Files = None,
        dataset_name: Optional[str] = None,
        dataset_config_name: Optional[str] = None,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "validation",
        predict_split: str = "validation",
        tokenizer_name_or_path: Optional[str] = None,
        max_length: int = 384,
        doc_stride: int = 128,
        micro_batch_size: int = 16,
        eval_micro_batch_size: int = 32,
        num_workers: int = 0,
        group_by_length: bool = False,
        pad_to_max_length: bool = False,
        pad_to_multiple_of: int = 8,
        version_2: bool = False,
        null_score_threshold: float = 0.0,
        max_answer_length: int = 30,
        n_best: int = 20,
        skip_misplaced_answers: bool = False,
        cache_dir: Optional[str] = None,
    ) -> None:
        """Create the data module; files are read lazily.

        Args:
            train_file: Training file or files in the JSON format of SQuAD (v1.1 or v2.0).
            validation_file: Validation file or files.
            test_file: Test file or files.
            predict_file: File or files to predict; answers are not required.
            dataset_name: Hub name or folder of a dataset with the columns of SQuAD, used for splits
                without files. 'quickstart' is a small generated dataset.
            dataset_config_name: Configuration of the dataset, if it has several.
            train_split: Training split of the dataset.
            validation_split: Validation split of the dataset.
            test_split: Test split of the dataset.
            predict_split: Split of the dataset to predict.
            tokenizer_name_or_path: Folder, hub name or checkpoint of the tokenizer; defaults to
                that of the model on the command line.
            max_length: Maximum number of tokens of a feature: question, window of the passage and
                special tokens.
            doc_stride: Overlap of consecutive windows in passage tokens.
            micro_batch_size: Features per training batch on one device; on a pipeline, per
                micro-batch, of which a batch has gradient_accumulation_steps.
            eval_micro_batch_size: Features per batch of validation, test and predict.
            num_workers: Number of worker processes of loaders; 0 uses the main process.
            group_by_length: Group features of similar length into batches to reduce padding.
            pad_to_max_length: Pad every batch to max_length instead of its longest feature.
            pad_to_multiple_of: Otherwise pad batches to a multiple of this number of tokens.
            version_2: Whether questions may be unanswerable (SQuAD v2.0).
            null_score_threshold: With version_2, the answer is empty if its score exceeds that of
                the best span by more than this.
            max_answer_length: Maximum number of tokens of an answer.
            n_best: Number of ranked candidates per question.
            skip_misplaced_answers: Skip answers that are not at their answer_start instead of
                raising an error.
            cache_dir: Folder of cached features; defaults to the cache folder of the user.

        Raises:
            UserError: If a value is out of range, or the stride does not fit the windows.
        """
        super().__init__()
        self.save_hyperparameters()
        settings = settings_of(self.hparams)
        enforce(data_rules(settings))
        for name in ("max_answer_length", "n_best", "pad_to_multiple_of"):
            enforce(count_rule(name, self.hparams[name]))
        self.answer_rules = AnswerRules(max_answer_length, n_best, version_2, null_score_threshold)
        self.splits = Splits(
            Sources(
                {name: paths_of(self.hparams[f"{name}_file"]) for name in SPLITS},
                dataset_name,
                dataset_config_name,
                {name: self.hparams[f"{name}_split"] for name in SPLITS},
                Path(cache_dir or default_cache_dir()),
            ),
            settings.windowing,
            tokenizer_name_or_path,
            Rules(version_2, skip_misplaced_answers=skip_misplaced_answers),
        )
        self._resume_from: Optional[Dict[str, int]] = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first access."""
        return self.splits.tokenizer

    def split(self, name: str) -> Split:
        """Return the split 'train', 'validation', 'test' or 'predict', read on first access.

        Raises:
            UserError: If there is no such data, or it is invalid.
        """
        return self.splits.features(name)

    @override
    def prepare_data(self) -> None:
        """Build the caches, in one process per machine."""
        verb = self.trainer.state.fn if self.trainer else None
        self.setup(str(verb.value) if verb else "fit")

    @override
    def setup(self, stage: str) -> None:
        """Read the splits that a verb needs.

        Raises:
            UserError: If the data is missing or invalid.
        """
        for name in self.splits.needed(stage):
            self.split(name)

    def read(self, verb: str) -> None:
        """Read the questions that a verb needs, to validate them before it starts.

        Raises:
            UserError: If the data is missing or invalid.
        """
        for name in self.splits.needed(verb):
            self.splits.questions(name)

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        """Return batches of training features, in the order of `TrainingSampler`."""
        table = FeatureTable(self.split("train").features)
        sampler_kwargs = self.trainer.distributed_sampler_kwargs if self.trainer else None
        batch_size = self.hparams["micro_batch_size"] * self._micro_batches
        sampler = TrainingSampler(
            table.lengths.tolist(),
            batch_size,
            self.hparams["group_by_length"],
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),  # set by seed_everything
            **(sampler_kwargs or {}),
        )
        loader = self._loader(table, batch_size, sampler)
        if self._resume_from:
            loader.load_state_dict(self._resume_from)
        return loader

    @override
    def val_dataloader(self) -> Union[DataLoader[Batch], Tuple[()]]:
        """Return batches of `eval_micro_batch_size` validation features, or none."""
        return self._eval_loader("validation") if self.splits.sources.has("validation") else ()

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        """Return batches of `eval_micro_batch_size` test features."""
        return self._eval_loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return batches of `eval_micro_batch_size` features to predict."""
        return self._eval_loader("predict")

    @override
    def state_dict(self) -> Dict[str, Dict[str, int]]:
        """Return the position in the training data.

        Lightning also saves the state of loaders, but restores only loaders that are created after
        the optimizer; ours are created before, to count the steps of the learning rate schedule.
        """
        state = training_position(self.trainer) if self.trainer else None
        return {"train": state} if state else {}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Dict[str, int]]) -> None:
        """Resume the next training loader from the position of a checkpoint."""
        self._resume_from = state_dict.get("train")

    def answers(self, split: str, parts: Parts) -> Answers:
        """Decode the logits of the batches of a split into ranked answers.

        Args:
            split: Name of the split.
            parts: Logits of the batches.
        """
        return decode(join_logits(parts), Windows.of(self.split(split).features), self.answer_rules)

    def scores(self, split: str, parts: Parts) -> Dict[str, float]:
        """Return ``exact_match`` and ``f1`` (0-100) over the questions in `parts`."""
        question_set = self.split(split).question_set
        return squad_scores(question_set, self.answers(split, parts).texts(question_set))

    @property
    def _micro_batches(self) -> int:
        """Micro-batches in a batch: above 1 if the strategy accumulates gradients."""
        return facts_of(self.trainer).micro_batches_per_batch

    @property
    def _length(self) -> Optional[int]:
        """Length of every batch; None if they differ."""
        fixed = self.hparams["pad_to_max_length"] or facts_of(self.trainer).static_shapes
        return int(self.hparams["max_length"]) if fixed else None

    def _loader(
        self, table: FeatureTable, batch_size: int, sampler: Optional[TrainingSampler] = None
    ) -> ResumableDataLoader:
        lengths = (self._length, self.hparams["pad_to_multiple_of"], self.hparams["max_length"])
        return ResumableDataLoader(
            table,
            batch_size=batch_size,  # a keyword: Lightning re-creates loaders for `predict`
            sampler=sampler,
            num_workers=self.hparams["num_workers"],
            collate_fn=Collator(self.tokenizer.pad_token_id, *lengths),
            # Otherwise loaders draw from the global generator of dropout masks, which a resumed run
            # would not repeat.
            generator=torch.Generator(),
        )

    def _eval_loader(self, split: str) -> DataLoader[Batch]:
        batch_size = self.hparams["eval_micro_batch_size"] * self._micro_batches
        # Sorted features need less padding; but a limited part must not be the longest ones.
        sort = self._length is None and not limits_evaluation(self.trainer)
        return self._loader(FeatureTable(self.split(split).features, sort), batch_size)
