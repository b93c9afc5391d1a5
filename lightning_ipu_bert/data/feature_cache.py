"""Cache of features on disk: built once, memory-mapped by later runs.

An entry is the folder of a `datasets.Dataset`, named by the hash of all inputs of features. Entries
are written atomically; concurrent processes wait for the one that builds an entry.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Mapping, Optional

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ipu_bert.data import features, tokenized
from lightning_ipu_bert.data.features import features_in_chunks
from lightning_ipu_bert.data.questions import QuestionSet
from lightning_ipu_bert.data.settings import Windowing, windowing_rules
from lightning_ipu_bert.files import built_once
from lightning_ipu_bert.pipeline.rules import enforce

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ROW_LENGTHS = {
    "input_ids": "counts",
    "token_type_ids": "counts",
    "offset_starts": "passage_counts",
    "offset_ends": "passage_counts",
}
"""List columns of features: the column with the lengths of their rows."""

SCALARS = ("start_positions", "end_positions", "question", "context_start")
"""Scalar columns of features; the index `feature` is added at the end."""


def default_cache_dir() -> Path:
    """Return the default cache folder: in $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "lightning_ipu_bert"


def cached_features(
    question_set: QuestionSet,
    tokenizer: PreTrainedTokenizerBase,
    windowing: Windowing,
    cache_dir: Optional[Path] = None,
    description: str = "Features",
) -> Dataset:
    """Return the features of a split from the cache, which is built if necessary.

    Args:
        question_set: The questions of the split.
        tokenizer: A fast tokenizer of transformers with BERT's pair template.
        windowing: How passages are split into windows.
        cache_dir: Cache folder.
        description: Description of the progress bar.

    Returns:
        One row per feature with ``input_ids``, ``token_type_ids``, ``start_positions``,
        ``end_positions`` (named as in Hugging Face's models), ``question``, ``context_start``,
        ``offset_starts``, ``offset_ends`` (see `features.build_features`) and ``feature``, the row.

    Raises:
        UserError: If the stride does not fit the windows, or a question is too long.
    """
    from datasets import load_from_disk

    enforce(windowing_rules(windowing))

    def build(folder: Path) -> None:
        dataset = build_dataset(question_set, tokenizer, windowing, description)
        dataset.save_to_disk(str(folder), num_shards=1)
        rank_zero_info(f"{description}: {len(dataset)} features cached in {final}")

    key = cache_key(question_set, tokenizer, windowing)
    final = Path(cache_dir or default_cache_dir()) / "features" / key
    return load_from_disk(str(built_once(final, build)))


def cache_key(
    question_set: QuestionSet, tokenizer: PreTrainedTokenizerBase, windowing: Windowing
) -> str:
    """Return the hash of all inputs of features: data, tokenizer, window lengths and code.

    It includes the version of `datasets`, of which older ones cannot read files of newer ones.
    """
    import datasets

    sources = (features.__file__, tokenized.__file__, __file__)
    code = b"".join(Path(source).read_bytes() for source in sources)
    specials = f"{tokenizer.cls_token_id},{tokenizer.sep_token_id}"
    parts = [question_set.digest(), tokenizer.backend_tokenizer.to_str(), specials, str(windowing)]
    parts.append(datasets.__version__)
    text = "\0".join([*parts, hashlib.sha256(code).hexdigest()])
    return hashlib.sha256(text.encode("utf8", "surrogatepass")).hexdigest()[:32]


def flat_column(dataset: Dataset, name: str) -> npt.NDArray[np.int64]:
    """Return a column as a flat array; rows of list columns are concatenated."""
    column = dataset.data.column(name).combine_chunks()
    values = column.flatten() if name in ROW_LENGTHS else column
    return np.asarray(values.to_numpy(zero_copy_only=False), np.int64)


def build_dataset(
    question_set: QuestionSet,
    tokenizer: PreTrainedTokenizerBase,
    windowing: Windowing,
    description: Optional[str] = None,
) -> Dataset:
    """Build the features of a split in memory, with a progress bar if `description` is given."""
    import pyarrow
    from datasets import Dataset
    from tqdm.auto import tqdm

    tables: List[pyarrow.Table] = []
    total = len(question_set.questions)
    hidden = description is None
    with tqdm(total=total, desc=description, unit=" q", leave=False, disable=hidden) as progress:
        for done, columns in features_in_chunks(question_set, tokenizer, windowing):
            tables.append(_arrow_table(columns))
            progress.update(done)
    table = pyarrow.concat_tables(tables)
    return Dataset(table.append_column("feature", [np.arange(table.num_rows, dtype=np.int32)]))


def _arrow_table(columns: Mapping[str, npt.NDArray[np.int64]]) -> pyarrow.Table:
    import pyarrow

    arrays: Dict[str, pyarrow.Array] = {}
    for name, lengths in ROW_LENGTHS.items():
        bounds = np.concatenate([[0], np.cumsum(columns[lengths])]).astype(np.int32)
        kind = np.int8 if name == "token_type_ids" else np.int32
        arrays[name] = pyarrow.ListArray.from_arrays(bounds, columns[name].astype(kind))
    for name in SCALARS:
        arrays[name] = columns[name].astype(np.int32)
    return pyarrow.table(arrays)
