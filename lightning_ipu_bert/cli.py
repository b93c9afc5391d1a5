"""The command line: the verbs of LightningCLI, and `ask` and `export`."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Optional, Sequence

from lightning_ipu_bert.commands.parser import exit_with
from lightning_ipu_bert.errors import UserError

COMMANDS = {verb: f"lightning_ipu_bert.commands.{verb}" for verb in ("ask", "export")}
"""Modules of the verbs that do not use a Trainer; they start without importing Lightning."""

DEBUG = "--debug"
"""Shows tracebacks: ValueErrors of other packages are printed in one line, too."""


def main(args: Optional[Sequence[str]] = None) -> None:
    """Run a verb; errors of the user are printed in one line, with exit code 2."""
    words = list(sys.argv[1:] if args is None else args)
    debug = DEBUG in words
    words = [word for word in words if word != DEBUG]
    try:
        if words and words[0] in COMMANDS:
            import_module(COMMANDS[words[0]]).main(words[1:])
        else:
            from lightning_ipu_bert.commands.trainer_verbs import QuestionAnsweringCLI

            QuestionAnsweringCLI(words)
    except UserError as error:
        if debug:
            raise
        exit_with(str(error))
