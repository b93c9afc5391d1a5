"""Splits: questions and features of 'train', 'validation', 'test' and 'predict', read lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, List, NamedTuple, Optional

from lightning_ipu_bert.data.feature_cache import cached_features
from lightning_ipu_bert.data.questions import QuestionSet
from lightning_ipu_bert.data.records import Rules
from lightning_ipu_bert.data.settings import Windowing
from lightning_ipu_bert.data.sources import Sources
from lightning_ipu_bert.data.tokenizer import load_tokenizer
from lightning_ipu_bert.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test", "predict")

SPLITS_OF = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}
"""The splits that each verb of the Trainer reads."""


class Split(NamedTuple):
    """Questions and features of a split."""

    question_set: QuestionSet
    features: Dataset
    """A `datasets.Dataset`: see `feature_cache.cached_features`."""


class Splits:
    """Reads splits and the tokenizer lazily, on first access."""

    def __init__(
        self, sources: Sources, windowing: Windowing, tokenizer: Optional[str], rules: Rules
    ) -> None:
        """Create the splits without reading them.

        Args:
            sources: Sources of the questions.
            windowing: How passages are split into windows.
            tokenizer: Folder, hub name or checkpoint; None uses the tokenizer of the dataset.
            rules: Rules for questions; those to predict need no answers.
        """
        self.sources = sources
        self.windowing = windowing
        self.rules = rules
        self._tokenizer_name = tokenizer
        self._tokenizer: Optional[PreTrainedTokenizerBase] = None
        self._question_sets: Dict[str, QuestionSet] = {}
        self._splits: Dict[str, Split] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            UserError: If none is set, or it cannot be loaded.
        """
        if self._tokenizer is None:
            name = self._tokenizer_name or self.sources.tokenizer
            if name is None:
                raise UserError(
                    "There is no tokenizer. Set --data.tokenizer_name_or_path, or "
                    "--model.model_name_or_path, whose tokenizer is used by default."
                )
            self._tokenizer = load_tokenizer(name)
        return self._tokenizer

    def needed(self, verb: str) -> List[str]:
        """Return the splits that a verb reads; validation is optional in fit."""
        optional = ["validation"] if verb == "fit" else []
        return [n for n in SPLITS_OF[verb] if self.sources.has(n) or n not in optional]

    def questions(self, name: str) -> QuestionSet:
        """Return the questions of a split.

        Raises:
            UserError: If there is no such data, or it is invalid.
        """
        if name not in self._question_sets:
            rules = self.rules._replace(answers_required=name != "predict")
            self._question_sets[name] = self.sources.read(name, rules)
        return self._question_sets[name]

    def features(self, name: str) -> Split:
        """Return a split with its features, which are cached on disk.

        Raises:
            UserError: As `questions` and `cached_features`.
        """
        if name not in self._splits:
            question_set = self.questions(name)
            folder, bar = self.sources.cache_dir, f"Features ({name})"
            features = cached_features(question_set, self.tokenizer, self.windowing, folder, bar)
            self._splits[name] = Split(question_set, features)
        return self._splits[name]
