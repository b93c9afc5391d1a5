"""Cache of features on disk: built once, memory-mapped by later runs.

An entry is the folder of a `datasets.Dataset`, named by the hash of all inputs of features. Entries
are written atomically; concurrent processes wait for the one that builds an entry.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ipu_bert.data import feature_columns, features, tokenized
from lightning_ipu_bert.data.feature_columns import build_columns
from lightning_ipu_bert.data.questions import QuestionSet
from lightning_ipu_bert.data.settings import Windowing, windowing_rules
from lightning_ipu_bert.files import built_once
from lightning_ipu_bert.pipeline.rules import enforce

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


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

    sources = (features.__file__, tokenized.__file__, feature_columns.__file__, __file__)
    code = b"".join(Path(source).read_bytes() for source in sources)
    specials = f"{tokenizer.cls_token_id},{tokenizer.sep_token_id}"
    parts = [question_set.digest(), tokenizer.backend_tokenizer.to_str(), specials, str(windowing)]
    parts.append(datasets.__version__)
    text = "\0".join([*parts, hashlib.sha256(code).hexdigest()])
    return hashlib.sha256(text.encode("utf8", "surrogatepass")).hexdigest()[:32]


def build_dataset(
    question_set: QuestionSet,
    tokenizer: PreTrainedTokenizerBase,
    windowing: Windowing,
    description: Optional[str] = None,
) -> Dataset:
    """Build the features of a split in memory, with a progress bar if `description` is given."""
    from datasets import Dataset

    return Dataset(build_columns(question_set, tokenizer, windowing, description).data)
