"""Command line parsers that say what is wrong in one line."""

from __future__ import annotations

import re
import sys
from typing import Any, List, NoReturn, Optional, Sequence

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_ipu_bert.pipeline.rules import nearest

UNKNOWN = re.compile(
    r"(?:option|key) '([\w.]+)'.*(?:not accept|not expect)|not accept.* (?:option|key) '([\w.]+)'"
    r"|unrecognized arguments: --([\w.]+)",
    re.IGNORECASE,
)
"""What jsonargparse says of an option or a field of a config file that it does not know."""


def exit_with(message: str) -> NoReturn:
    """Print an error in one line and end with code 2, the code of wrong usage."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    raise SystemExit(2)


class Parser(LightningArgumentParser):
    """Lightning's parser, without the sixty lines of usage before each error."""

    verbs: Sequence[Parser] = ()
    """The parsers of the verbs, where this one reads which verb it is."""

    @override
    def error(self, message: str, ex: Optional[Exception] = None) -> NoReturn:
        """Print the error alone, with the nearest name for a misspelled one; `--help` has the rest.

        A class that is given by its path has a parser of its own, of its arguments.
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
    """Return an empty parser for one of the verbs beside the Trainer's."""
    return Parser(prog=f"python -m lightning_ipu_bert {name}", description=description or "")
