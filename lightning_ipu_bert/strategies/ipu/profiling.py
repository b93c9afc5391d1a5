"""PopVision profiles, enabled by an environment variable that is restored."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from typing import Dict, Iterator, Optional

from lightning_ipu_bert.errors import UserError

VARIABLE = "POPLAR_ENGINE_OPTIONS"


@contextmanager
def profiled(folder: str) -> Iterator[None]:
    """Profile programs that are compiled and run within the context.

    Options that are already set in the variable take precedence.

    Args:
        folder: Folder of the profiles; empty disables profiling.
    """
    before = os.environ.get(VARIABLE)
    if not folder:
        yield
        return
    wanted = {
        "autoReport.all": "true",
        "autoReport.directory": folder,
        "debug.allowOutOfMemory": "true",
    }
    os.environ[VARIABLE] = json.dumps({**wanted, **_options(before)})
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


def _options(text: Optional[str]) -> Dict[str, str]:
    try:
        options = json.loads(text) if text else {}
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise UserError(f"{VARIABLE}={text!r} is not a JSON object. Fix it or unset it.")
    return options
