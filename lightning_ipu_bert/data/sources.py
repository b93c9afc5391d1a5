"""Sources of the questions of each split."""

from __future__ import annotations

from pathlib import Path
from typing import List, Mapping, NamedTuple, Optional, Tuple, Union

from lightning_ipu_bert.data import hub
from lightning_ipu_bert.data.formats import read_files
from lightning_ipu_bert.data.questions import QuestionSet
from lightning_ipu_bert.data.quickstart.folder import NAME, quickstart_folder
from lightning_ipu_bert.data.records import Rules, collect
from lightning_ipu_bert.errors import UserError

Files = Union[str, List[str], None]


class Sources(NamedTuple):
    """Files and dataset of all splits; files take precedence."""

    files: Mapping[str, Tuple[str, ...]]
    """Paths of the files of every split; may be empty."""
    dataset_name: Optional[str]
    """Hub name or folder of a dataset, or 'quickstart'."""
    dataset_config_name: Optional[str]
    hub_splits: Mapping[str, str]
    """Name in the dataset of every split."""
    cache_dir: Path
    """Folder of the quickstart dataset."""

    def has(self, split: str) -> bool:
        """Return whether there are files or a dataset for a split."""
        return bool(self.files[split] or self.dataset_name)

    @property
    def tokenizer(self) -> Optional[str]:
        """The tokenizer of the dataset, or None."""
        if self.dataset_name != NAME:
            return None
        return str(quickstart_folder(self.cache_dir) / "tokenizer")

    def read(self, split: str, rules: Rules) -> QuestionSet:
        """Read the questions of a split.

        Raises:
            UserError: If there is no data, or it is invalid.
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
            f"There is no data for the split '{split}'. Pass --data.{split}_file or "
            f"--data.dataset_name, or use --config quickstart.yaml, which needs no files."
        )


def paths_of(files: Files) -> Tuple[str, ...]:
    """Return the paths of a file, a list of files, or none."""
    return (files,) if isinstance(files, str) else tuple(files or ())
