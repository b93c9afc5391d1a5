"""`ipu_config.json`: read from a file, a folder or the hub, and written next to checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, Mapping, Union

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.files import written_atomically
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig

FILE_NAME = "ipu_config.json"

Source = Union[str, Path, Mapping[str, object], IPUConfig, None]


def read_values(source: Source) -> Mapping[str, object]:
    """Return the fields that are set in a source.

    Args:
        source: A file, a folder, a hub name or a mapping of fields; e.g.
            "Graphcore/bert-large-ipu", or "runs/squad" after a run.

    Raises:
        UserError: If the file does not exist or cannot be read.
    """
    if isinstance(source, IPUConfig):
        return source.to_dict()
    if isinstance(source, Mapping):
        return source
    return _read(str(source)) if source else {}


def save_ipu_config(config: IPUConfig, folder: Path) -> Path:
    """Write a configuration to `ipu_config.json` in a folder."""
    path = folder / FILE_NAME
    with written_atomically(path) as partial:
        partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    return path


def _read(source: str) -> Dict[str, object]:
    path = Path(source)
    try:
        if not path.exists():
            path = Path(hf_hub_download(source, FILE_NAME))
        elif path.is_dir():
            path = path / FILE_NAME
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, HFValidationError) as error:
        raise UserError(
            f"No IPU config could be read from '{source}': {str(error).splitlines()[0]} "
            f"Pass a {FILE_NAME}, a folder that contains one, or a hub name, e.g. "
            "Graphcore/bert-large-ipu."
        ) from error
    if not isinstance(values, dict):
        raise UserError(
            f"'{path}' does not contain the fields of an IPU config. Pass a {FILE_NAME}."
        )
    return values
