"""Command line parsers that say what is wrong in one line."""

from __future__ import annotations

import sys
from typing import Any, NoReturn, Optional

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override


def exit_with(message: str) -> NoReturn:
    """Print an error in one line and end with code 2, the code of wrong usage."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    raise SystemExit(2)


class Parser(LightningArgumentParser):
    """Lightning's parser, without the sixty lines of usage before each error."""

    @override
    def error(self, message: str, ex: Optional[Exception] = None) -> NoReturn:
        """Print the error alone; `--help` has the rest."""
        exit_with(message)


def command_parser(name: str, description: Optional[str]) -> Any:
    """Return an empty parser for one of the verbs beside the Trainer's."""
    return Parser(prog=f"python -m lightning_ipu_bert {name}", description=description or "")
