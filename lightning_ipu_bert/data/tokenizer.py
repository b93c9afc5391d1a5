"""Tokenizers: from a folder, the hub or a checkpoint, and as plain text to put into one."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, Dict, Mapping

from transformers import AutoTokenizer

from lightning_ipu_bert.checkpoint_file import TOKENIZER_KEY, read_checkpoint
from lightning_ipu_bert.errors import UserError

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""A file name without a folder, a drive or a hidden file's dot."""


def load_tokenizer(name_or_path: str) -> Any:
    """Load a fast tokenizer with BERT's pair template.

    Args:
        name_or_path: Folder, hub name, or a checkpoint of `BertForQuestionAnsweringModule`.

    Raises:
        UserError: If there is none, it is not a fast one, or it joins pairs in another way.
    """
    if name_or_path.endswith(".ckpt"):
        return _from_checkpoint(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"No tokenizer could be loaded from '{name_or_path}': {reason} "
            "Give a folder or a hub name that holds one with --data.tokenizer_name_or_path."
        ) from error
    check_tokenizer(tokenizer, name_or_path)
    return tokenizer


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Refuse tokenizers whose features we could not build.

    Raises:
        UserError: If the tokenizer is not a fast one or does not give [CLS] A [SEP] B [SEP].
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"The tokenizer of '{name}' is not a fast one, so it knows no character offsets. "
            "Give one with a tokenizer.json."
        )
    a, b = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("a", "b"))
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    if tokenizer("a", "b")["input_ids"] != [cls, *a, sep, *b, sep]:
        raise UserError(
            f"The tokenizer of '{name}' does not join question and passage as "
            "[CLS] A [SEP] B [SEP]. Give a BERT tokenizer."
        )


def tokenizer_to_files(tokenizer: Any) -> Dict[str, str]:
    """Return the tokenizer as {file name: text}, to be kept in a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {
            path.name: path.read_text("utf8")
            for path in sorted(Path(folder).iterdir())
            if path.is_file()
        }


def tokenizer_from_files(files: Mapping[str, str]) -> Any:
    """Return the tokenizer that `tokenizer_to_files` took apart.

    Args:
        files: Come from a checkpoint, which may come from anybody.

    Raises:
        UserError: If a name could lead out of the folder in which the files are written.
    """
    check_file_names(files)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, "utf8")
        return AutoTokenizer.from_pretrained(folder)


def check_file_names(files: Mapping[str, str]) -> None:
    """Check that all names are plain file names.

    Raises:
        UserError: If one is absolute, climbs, or names a folder.
    """
    for name, text in files.items():
        if not (isinstance(name, str) and isinstance(text, str) and PLAIN_NAME.fullmatch(name)):
            raise UserError(
                f"The checkpoint names a tokenizer file {str(name)[:100]!r}, which must be a plain "
                "file name with a text, e.g. tokenizer.json. Do not trust this checkpoint, or give "
                "another tokenizer to its exported weights."
            )


def _from_checkpoint(path: str) -> Any:
    checkpoint = read_checkpoint(path)
    if not checkpoint.get(TOKENIZER_KEY):
        raise UserError(
            f"Checkpoint '{path}' holds no tokenizer. Give one with --data.tokenizer_name_or_path."
        )
    return tokenizer_from_files(checkpoint[TOKENIZER_KEY])
