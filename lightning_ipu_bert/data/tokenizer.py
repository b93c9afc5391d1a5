"""Tokenizers: loaded from a folder, the hub or a checkpoint, and saved in checkpoints."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Dict, Mapping

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_ipu_bert.checkpoint_file import TOKENIZER_KEY, read_checkpoint
from lightning_ipu_bert.errors import UserError

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""A file name without folder, drive or leading dot."""


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer with BERT's pair template.

    Args:
        name_or_path: Folder, hub name, or a checkpoint of `BertForQuestionAnsweringModule`.

    Raises:
        UserError: If there is no tokenizer, or it is not supported.
    """
    if name_or_path.endswith(".ckpt"):
        return _from_checkpoint(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"No tokenizer could be loaded from '{name_or_path}': {reason} "
            "Pass a folder or hub name with a tokenizer by --data.tokenizer_name_or_path."
        ) from error
    check_tokenizer(tokenizer, name_or_path)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Check that features can be built with a tokenizer.

    Raises:
        UserError: If the tokenizer is not fast or does not return [CLS] A [SEP] B [SEP].
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"The tokenizer of '{name}' is not a fast tokenizer, so it has no character offsets. "
            "Use one with a tokenizer.json."
        )
    a, b = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("a", "b"))
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    if tokenizer("a", "b")["input_ids"] != [cls, *a, sep, *b, sep]:
        raise UserError(
            f"The tokenizer of '{name}' does not join question and passage as "
            "[CLS] A [SEP] B [SEP]. Use a BERT tokenizer."
        )


def tokenizer_to_files(tokenizer: PreTrainedTokenizerBase) -> Dict[str, str]:
    """Return the files of a tokenizer as {name: text}, to be saved in a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {
            path.name: path.read_text("utf8")
            for path in sorted(Path(folder).iterdir())
            if path.is_file()
        }


def tokenizer_from_files(files: Mapping[str, str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer from its files.

    Args:
        files: {name: text} of a checkpoint, which is not trusted.

    Raises:
        UserError: If a name could be outside of the folder in which the files are written.
    """
    check_file_names(files)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, "utf8")
        return AutoTokenizer.from_pretrained(folder)


def check_file_names(files: Mapping[str, str]) -> None:
    """Check that all names are plain file names.

    Raises:
        UserError: If a name is absolute or contains a folder.
    """
    for name, text in files.items():
        if not (isinstance(name, str) and isinstance(text, str) and PLAIN_NAME.fullmatch(name)):
            raise UserError(
                f"The checkpoint names a tokenizer file {str(name)[:100]!r}, which must be a plain "
                "file name with a text, e.g. tokenizer.json. Use a checkpoint that you trust."
            )


def _from_checkpoint(path: str) -> PreTrainedTokenizerBase:
    checkpoint = read_checkpoint(path)
    if not checkpoint.get(TOKENIZER_KEY):
        raise UserError(
            f"Checkpoint '{path}' has no tokenizer. Pass one by --data.tokenizer_name_or_path."
        )
    return tokenizer_from_files(checkpoint[TOKENIZER_KEY])
