"""`SquadDataModule`: SQuAD files or hub data sets as batches of features for Lightning."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple, Union

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ipu_bert.data.answers import AnswerRules, Answers, Windows, decode
from lightning_ipu_bert.data.feature_cache import default_cache_dir
from lightning_ipu_bert.data.loaders import Collator, ResumableDataLoader, TrainingSampler
from lightning_ipu_bert.data.logits import join_logits
from lightning_ipu_bert.data.metrics import squad_scores
from lightning_ipu_bert.data.records import Rules
from lightning_ipu_bert.data.settings import data_rules, settings_of
from lightning_ipu_bert.data.sources import Sources
from lightning_ipu_bert.data.splits import SPLITS, Split, Splits
from lightning_ipu_bert.pipeline.facts import facts_of
from lightning_ipu_bert.pipeline.rules import count_rule, enforce

Files = Union[str, List[str], None]


class SquadDataModule(pl.LightningDataModule):
    """Questions on passages, as windows of tokens, from SQuAD files or the Hugging Face hub."""

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
        version_2: bool = False,
        null_score_threshold: float = 0.0,
        max_answer_length: int = 30,
        n_best: int = 20,
        skip_misplaced_answers: bool = False,
        cache_dir: Optional[str] = None,
    ) -> None:
        """Create the data module; nothing is read before the Trainer asks for it.

        Args:
            train_file: File or files in SQuAD's JSON format (v1.1 or v2.0) to train on.
            validation_file: File or files to evaluate on during and after training.
            test_file: File or files for the verb test.
            predict_file: File or files for the verb predict; they need no answers.
            dataset_name: Data set of the hub, or a folder, with SQuAD's columns, for every split
                that has no file. 'quickstart' is a small one that the package generates.
            dataset_config_name: Configuration of that data set, if it has several.
            train_split: Its split to train on.
            validation_split: Its split to evaluate on.
            test_split: Its split for the verb test.
            predict_split: Its split for the verb predict.
            tokenizer_name_or_path: Folder, hub name or checkpoint with the tokenizer. On the
                command line it follows the model.
            max_length: Tokens in a feature: question, window of the passage, special tokens.
            doc_stride: Passage tokens that two neighbouring windows share.
            micro_batch_size: Features in a training batch on one device; on a pipeline, in each
                of the strategy's gradient_accumulation_steps micro-batches.
            eval_micro_batch_size: Features in a batch of validation, test and predict.
            num_workers: Processes that prepare batches; 0 prepares them in the main process.
            group_by_length: Put features of alike length into one training batch: less padding.
            pad_to_max_length: Pad every batch to max_length, not to its longest feature.
            version_2: Some questions have no answer in their passage (SQuAD v2.0).
            null_score_threshold: With version_2, answer nothing where that scores better than the
                best span by more than this.
            max_answer_length: Tokens of the longest answer.
            n_best: Candidates that are ranked for each question.
            skip_misplaced_answers: Leave out answers that do not stand at their answer_start,
                instead of refusing the data.
            cache_dir: Folder for features between runs; by default in the user's cache.

        Raises:
            UserError: If window and stride do not fit, or a number is out of its range.
        """
        super().__init__()
        self.save_hyperparameters()
        settings = settings_of(self.hparams)
        enforce(data_rules(settings))
        for name in ("max_answer_length", "n_best"):
            enforce(count_rule(name, self.hparams[name]))
        self.answer_rules = AnswerRules(max_answer_length, n_best, version_2, null_score_threshold)
        self.splits = Splits(
            Sources(
                {name: _paths(self.hparams[f"{name}_file"]) for name in SPLITS},
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
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when it is first asked for."""
        return self.splits.tokenizer

    def split(self, name: str) -> Split:
        """Return 'train', 'validation', 'test' or 'predict'; it is read when first asked for.

        Raises:
            UserError: If there are no such data, or they break a rule of the format.
        """
        return self.splits.features(name)

    @override
    def prepare_data(self) -> None:
        """Build the caches, in one process of each machine."""
        verb = self.trainer.state.fn if self.trainer else None
        self.setup(str(verb.value) if verb else "fit")

    @override
    def setup(self, stage: str) -> None:
        """Read the splits that a verb needs.

        Raises:
            UserError: If the data are missing or wrong.
        """
        for name in self.splits.needed(stage):
            self.split(name)

    def read(self, verb: str) -> None:
        """Read the questions that a verb needs, to find what is wrong with them before it begins.

        Raises:
            UserError: If the data are missing or wrong.
        """
        for name in self.splits.needed(verb):
            self.splits.questions(name)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of micro-batches of features, in the order of `TrainingSampler`."""
        features = self.split("train").features
        rows = features.data.column("input_ids").combine_chunks()
        share = self.trainer.distributed_sampler_kwargs if self.trainer else None
        batch_size = self.hparams["micro_batch_size"] * self._micro_batches
        sampler = TrainingSampler(
            rows.value_lengths().to_pylist(),
            batch_size,
            self.hparams["group_by_length"],
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),  # set by seed_everything
            **(share or {}),
        )
        loader = self._loader(features, batch_size, sampler)
        if self._resume_from:
            loader.load_state_dict(self._resume_from)
        return loader

    @override
    def val_dataloader(self) -> Union[DataLoader[Any], Tuple[()]]:
        """Return batches of `eval_micro_batch_size` validation features, or none."""
        return self._eval_loader("validation") if self.splits.sources.has("validation") else ()

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches of `eval_micro_batch_size` test features."""
        return self._eval_loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches of `eval_micro_batch_size` features to predict."""
        return self._eval_loader("predict")

    @override
    def state_dict(self) -> Dict[str, Any]:
        """Return the position in the training data, for a checkpoint.

        Lightning keeps the state of loaders, too, but restores it only to those that are made after
        the optimizer; ours are made before, to count the steps of the learning rate's schedule.
        """
        if self.trainer is None or not isinstance(
            self.trainer.train_dataloader, ResumableDataLoader
        ):
            return {}
        state = self.trainer.train_dataloader.state_dict()
        # A save before a batch is trained on, by SLURM's signal, must not count it as done.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        state["batches"] -= progress.ready - progress.processed
        return {"train": state}

    @override
    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Let the next training loader go on where the checkpoint was saved."""
        self._resume_from = state_dict.get("train")

    def answers(self, split: str, parts: Iterable[Tuple[Any, Any, Any]]) -> Answers:
        """Turn the logits of a split's batches into ranked answers.

        Args:
            split: Name of the split.
            parts: ``feature`` [B], start logits [B, S] and end logits [B, S] of each batch.
        """
        return decode(join_logits(parts), Windows.of(self.split(split).features), self.answer_rules)

    def scores(self, split: str, parts: Iterable[Tuple[Any, Any, Any]]) -> Dict[str, float]:
        """Return ``exact_match`` and ``f1`` (0-100) of the questions whose logits are given."""
        question_set = self.split(split).question_set
        return squad_scores(question_set, self.answers(split, parts).texts(question_set))

    @property
    def _micro_batches(self) -> int:
        """Micro-batches in a batch: above 1 under strategies that accumulate by themselves."""
        return facts_of(self.trainer).micro_batches_per_batch

    def _loader(self, features: Any, batch_size: int, sampler: Any = None) -> ResumableDataLoader:
        fixed = self.hparams["pad_to_max_length"] or facts_of(self.trainer).static_shapes
        length = self.hparams["max_length"] if fixed else None
        return ResumableDataLoader(
            features,
            batch_size=batch_size,  # by name: Lightning makes loaders anew for `predict`
            sampler=sampler,
            num_workers=self.hparams["num_workers"],
            collate_fn=Collator(self.tokenizer.pad_token_id, length),
            # Or every loader would draw from the generator of the dropout masks, and a resumed run
            # would not repeat them.
            generator=torch.Generator(),
        )

    def _eval_loader(self, split: str) -> DataLoader[Any]:
        batch_size = self.hparams["eval_micro_batch_size"] * self._micro_batches
        return self._loader(self.split(split).features, batch_size)


def _paths(files: Files) -> Tuple[str, ...]:
    return (files,) if isinstance(files, str) else tuple(files or ())
