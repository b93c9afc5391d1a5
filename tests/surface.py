"""The surface of the package: public names with their arguments, and our own flags of every verb.

python tests/surface.py > tests/surface.txt
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from importlib import import_module
from typing import Any, Iterator, List

import lightning_ipu_bert
from lightning_ipu_bert.cli import COMMANDS
from lightning_ipu_bert.commands import parser
from lightning_ipu_bert.commands.trainer_verbs import QuestionAnsweringCLI

GROUPS = ("model", "data", "predictions")
"""Groups of options that are ours; the others are Lightning's, and differ by version."""
VERBS = ("fit", "validate", "test", "predict")


class ParsersBuiltError(Exception):
    """Raised once all parsers exist."""


def surface() -> List[str]:
    """Return one line per name, argument and flag."""
    return [*_names(), *_trainer_flags(), *_command_flags()]


def _names() -> Iterator[str]:
    for name in sorted(lightning_ipu_bert.__all__):
        member = getattr(lightning_ipu_bert, name)
        yield name
        if not inspect.isclass(member) or issubclass(member, Exception):
            continue
        for argument in inspect.signature(member).parameters.values():
            if argument.name not in ("args", "kwargs"):
                required = argument.default is inspect.Parameter.empty
                yield f"{name}({argument.name}{'' if required else f'={argument.default!r}'})"
        for method in sorted(vars(member)):
            value = getattr(member, method)  # static methods are callable as such before 3.10
            if not method.startswith("_") and callable(value) and not inspect.isclass(value):
                yield f"{name}.{method}()"


def _trainer_flags() -> Iterator[str]:
    class Parsers(QuestionAnsweringCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise ParsersBuiltError

    for verb in VERBS:
        cli = Parsers.__new__(Parsers)
        with suppress(ParsersBuiltError):
            cli.__init__([verb])  # type: ignore[misc]
        defaults = cli.defaults_of(verb)
        for name, value in sorted(defaults.items()):
            if name.split(".")[0] in GROUPS:
                yield f"{verb} --{name}={value!r}"


def _command_flags() -> Iterator[str]:
    for verb, module in sorted(COMMANDS.items()):
        for action in _actions_of(import_module(module).main):
            for flag in action.option_strings:
                yield f"{verb} {flag}={action.default!r}"


def _actions_of(command: Any) -> Any:
    built = []
    original = parser.Parser.parse_args

    def stop(self: Any, *_: Any, **__: Any) -> None:
        built.append(self)
        raise ParsersBuiltError

    parser.Parser.parse_args = stop  # type: ignore[method-assign]
    try:
        with suppress(ParsersBuiltError):
            command([])
    finally:
        parser.Parser.parse_args = original  # type: ignore[method-assign]
    return built[0]._actions


if __name__ == "__main__":
    print("\n".join(surface()))
