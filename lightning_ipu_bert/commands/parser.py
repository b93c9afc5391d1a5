"""Command line parsers with one-line errors."""

from __future__ import annotations

import re
import sys
from typing import Any, List, NoReturn, Optional, Sequence

from jsonargparse import ArgumentParser
from typing_extensions import override

from lightning_ipu_bert.pipeline.rules import nearest

UNKNOWN = re.compile(
    r"(?:option|key) '([\w.]+)'.*(?:not accept|not expect)|not accept.* (?:option|key) '([\w.]+)'"
    r"|unrecognized arguments: --([\w.]+)",
    re.IGNORECASE,
)
"""Messages of jsonargparse about unknown options and fields of config files."""


def exit_with(message: str) -> NoReturn:
    """Print an error in one line and exit with code 2 (wrong usage)."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    raise SystemExit(2)


class Parser(ArgumentParser):
    """Parser of jsonargparse that prints errors without the usage."""

    verbs: Sequence[Parser] = ()
    """The parsers of the verbs, if this parser selects one of them."""

    @override
    def error(self, message: str, ex: Optional[Exception] = None) -> NoReturn:
        """Print the error without the usage, and suggest the nearest name for a misspelled one.

        A class that is selected by class_path has a separate parser for its arguments.
        """
        found = UNKNOWN.search(message)
        if found is not None:
            name = next(filter(None, found.groups()))
            message = f"{message}. Did you mean '{nearest(name, self._known_names())}'?"
        exit_with(message)

    def _known_names(self) -> List[str]:
        parsers = [self, *self.verbs]
        defaults = [parser.get_defaults(skip_validation=True) for parser in parsers]
        return [name for options in defaults for name, _ in options.items()]


def command_parser(name: str, description: Optional[str]) -> Any:
    """Return an empty parser for a verb that is not one of the Trainer."""
    return Parser(prog=f"python -m lightning_ipu_bert {name}", description=description or "")
