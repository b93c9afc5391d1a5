"""`SquadDataModule`: SQuAD files or hub data sets as batches of features for Lightning."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple, Union

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_ipu_bert.data import quickstart
from lightning_ipu_bert.data.answers import AnswerRules, Answers, Windows, decode, join_logits
from lightning_ipu_bert.data.feature_cache import cached_features, default_cache_dir
from lightning_ipu_bert.data.features import Windowing, check_windowing
from lightning_ipu_bert.data.formats.records import Rules, read_files, read_hub
from lightning_ipu_bert.data.loaders import Collator, ResumableDataLoader, TrainingSampler
from lightning_ipu_bert.data.metrics import squad_scores
from lightning_ipu_bert.data.questions import QuestionSet
from lightning_ipu_bert.data.tokenizer import load_tokenizer
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.files import built_once
from lightning_ipu_bert.pipeline.facts import facts_of

Files = Union[str, List[str], None]

SPLITS_OF = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}
"""The splits that each verb of the Trainer reads."""


class Split(NamedTuple):
    """One split, ready for use."""

    question_set: QuestionSet
    features: Any
    """A `datasets.Dataset`: see `feature_cache.cached_features`."""


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
        self.files = {
            "train": train_file,
            "validation": validation_file,
            "test": test_file,
            "predict": predict_file,
        }
        self.hub_splits = {
            "train": train_split,
            "validation": validation_split,
            "test": test_split,
            "predict": predict_split,
        }
        self.windowing = Windowing(max_length, doc_stride)
        self.answer_rules = AnswerRules(max_answer_length, n_best, version_2, null_score_threshold)
        check_windowing(self.windowing)
        for name in ("micro_batch_size", "eval_micro_batch_size", "max_answer_length", "n_best"):
            if self.hparams[name] < 1:
                raise UserError(f"{name}={self.hparams[name]} must be at least 1.")
        self._tokenizer: Any = None
        self._question_sets: Dict[str, QuestionSet] = {}
        self._splits: Dict[str, Split] = {}
        self._resume_from: Optional[Dict[str, int]] = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when it is first asked for."""
        if self._tokenizer is None:
            name = self.hparams["tokenizer_name_or_path"]
            if name is None and self.hparams["dataset_name"] == quickstart.NAME:
                name = str(self._quickstart_folder() / "tokenizer")
            if name is None:
                raise UserError(
                    "No tokenizer is known. Give --data.tokenizer_name_or_path, or a model by "
                    "--model.model_name_or_path, whose tokenizer is then used."
                )
            self._tokenizer = load_tokenizer(name)
        return self._tokenizer

    def split(self, name: str) -> Split:
        """Return 'train', 'validation', 'test' or 'predict'; it is read when first asked for.

        Raises:
            UserError: If there are no such data, or they break a rule of the format.
        """
        if name not in self._splits:
            question_set = self._questions(name)
            features = cached_features(
                question_set, self.tokenizer, self.windowing, self._cache_dir, f"Features ({name})"
            )
            self._splits[name] = Split(question_set, features)
        return self._splits[name]

    def has_split(self, name: str) -> bool:
        """Say whether a file or a data set is given for a split."""
        return bool(self.files[name] or self.hparams["dataset_name"])

    def prepare_data(self) -> None:
        """Build the caches, in one process of each machine."""
        verb = self.trainer.state.fn if self.trainer else None
        self.setup(str(verb.value) if verb else "fit")

    def setup(self, stage: str) -> None:
        """Read the splits that a verb needs.

        Raises:
            UserError: If the data are missing or wrong.
        """
        for name in self._needed(stage):
            self.split(name)

    def read(self, verb: str) -> None:
        """Read the questions that a verb needs, to find what is wrong with them before it begins.

        Raises:
            UserError: If the data are missing or wrong.
        """
        for name in self._needed(verb):
            self._questions(name)

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

    def val_dataloader(self) -> Union[DataLoader[Any], Tuple[()]]:
        """Return batches of `eval_micro_batch_size` validation features, or none."""
        return self._eval_loader("validation") if self.has_split("validation") else ()

    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches of `eval_micro_batch_size` test features."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches of `eval_micro_batch_size` features to predict."""
        return self._eval_loader("predict")

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

    @property
    def _cache_dir(self) -> Path:
        return Path(self.hparams["cache_dir"] or default_cache_dir())

    def _quickstart_folder(self) -> Path:
        code = hashlib.sha256(Path(quickstart.__file__).read_bytes()).hexdigest()[:8]
        return built_once(self._cache_dir / f"quickstart-{code}", quickstart.write_quickstart)

    def _needed(self, verb: str) -> List[str]:
        optional = ["validation"] if verb == "fit" else []
        return [name for name in SPLITS_OF[verb] if self.has_split(name) or name not in optional]

    def _questions(self, split: str) -> QuestionSet:
        if split not in self._question_sets:
            self._question_sets[split] = self._read(split)
        return self._question_sets[split]

    def _read(self, split: str) -> QuestionSet:
        rules = Rules(
            self.hparams["version_2"], split != "predict", self.hparams["skip_misplaced_answers"]
        )
        files, dataset_name = self.files[split], self.hparams["dataset_name"]
        if files:
            return read_files([files] if isinstance(files, str) else files, rules)
        if dataset_name == quickstart.NAME:
            file = "train.json" if split == "train" else "validation.json"
            return read_files([str(self._quickstart_folder() / file)], rules)
        if dataset_name:
            config = self.hparams["dataset_config_name"]
            return read_hub(dataset_name, config, self.hub_splits[split], rules)
        raise UserError(
            f"There are no data for the split '{split}'. Give --data.{split}_file or "
            f"--data.dataset_name, or run --config quickstart.yaml, which needs none."
        )

    def _loader(self, features: Any, batch_size: int, sampler: Any = None) -> ResumableDataLoader:
        fixed = self.hparams["pad_to_max_length"] or facts_of(self.trainer).static_shapes
        length = self.windowing.max_length if fixed else None
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
