"""File formats of questions. A new format is a module in this folder that defines `FORMAT`."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import List, Sequence

from lightning_ipu_bert.data.file_format import FileFormat
from lightning_ipu_bert.data.questions import QuestionSet
from lightning_ipu_bert.data.records import Rules, collect

DEFAULT = "squad_json"
"""The format of files with an unknown suffix."""


def file_formats() -> List[FileFormat]:
    """Return the formats in this folder, the default first."""
    names = sorted((m.name for m in pkgutil.iter_modules(__path__)), key=lambda n: n != DEFAULT)
    formats: List[FileFormat] = [import_module(f"{__name__}.{name}").FORMAT for name in names]
    return formats


def format_of(path: str) -> FileFormat:
    """Return the format of a file by its suffix."""
    formats = file_formats()
    name = Path(path).name.lower()
    return next((f for f in formats if name.endswith(f.suffixes)), formats[0])


def read_files(paths: Sequence[str], rules: Rules) -> QuestionSet:
    """Read files, each in its format, as one split.

    Args:
        paths: Paths of the files.
        rules: Rules for the questions.

    Raises:
        UserError: If a file is missing, cannot be parsed, or is invalid.
    """
    return collect((record for path in paths for record in format_of(path).records(path)), rules)
