"""Sources: where the questions of each split come from."""

from __future__ import annotations

from pathlib import Path
from typing import Mapping, NamedTuple, Optional, Tuple

from lightning_ipu_bert.data import hub
from lightning_ipu_bert.data.formats import read_files
from lightning_ipu_bert.data.questions import QuestionSet
from lightning_ipu_bert.data.quickstart.folder import NAME, quickstart_folder
from lightning_ipu_bert.data.records import Rules, collect
from lightning_ipu_bert.errors import UserError


class Sources(NamedTuple):
    """Files and data sets by split: a split is read from its files, or else from the data set."""

    files: Mapping[str, Tuple[str, ...]]
    """Paths of the files of every split; empty where it has none."""
    dataset_name: Optional[str]
    """Hub name or folder of a data set, or 'quickstart'."""
    dataset_config_name: Optional[str]
    hub_splits: Mapping[str, str]
    """Name in the data set of every split."""
    cache_dir: Path
    """Where the quickstart's folder is kept."""

    def has(self, split: str) -> bool:
        """Return whether a file or a data set is given for a split."""
        return bool(self.files[split] or self.dataset_name)

    @property
    def tokenizer(self) -> Optional[str]:
        """The tokenizer that comes with the data, if one does."""
        if self.dataset_name != NAME:
            return None
        return str(quickstart_folder(self.cache_dir) / "tokenizer")

    def read(self, split: str, rules: Rules) -> QuestionSet:
        """Read the questions of a split.

        Raises:
            UserError: If there are none, or they break a rule.
        """
        if self.files[split]:
            return read_files(self.files[split], rules)
        if self.dataset_name == NAME:
            file = "train.json" if split == "train" else "validation.json"
            return read_files([str(quickstart_folder(self.cache_dir) / file)], rules)
        if self.dataset_name:
            name, config = self.dataset_name, self.dataset_config_name
            return collect(hub.records(name, config, self.hub_splits[split]), rules)
        raise UserError(
            f"There are no data for the split '{split}'. Give --data.{split}_file or "
            f"--data.dataset_name, or run --config quickstart.yaml, which needs none."
        )
