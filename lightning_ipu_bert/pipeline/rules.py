"""Rules as values: the invalid value, the rule, and how to fix it.

A rule is a function that yields violations. Strategies raise the first one; other code may collect
all of them. Rules need neither torch nor devices.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Iterable, Iterator, NamedTuple

from typing_extensions import override

from lightning_ipu_bert.errors import UserError


class Violation(NamedTuple):
    """A value that violates a rule."""

    field: str
    """The field or object as the user writes it, e.g. gradient_accumulation_steps."""
    value: object
    """Its value; None if the field alone is sufficient."""
    rule: str
    """The rule, as the continuation of the sentence "field=value ..."."""
    fix: str
    """How to fix it, as complete sentences."""

    @override
    def __str__(self) -> str:
        """Return the violation in one line."""
        subject = self.field if self.value is None else f"{self.field}={self.value!r}"
        return f"{subject} {self.rule}. {self.fix}"


def enforce(violations: Iterable[Violation]) -> None:
    """Raise the first violation.

    Raises:
        UserError: If there is one.
    """
    for violation in violations:
        raise UserError(str(violation))


def count_rule(field: str, value: Any) -> Iterator[Violation]:
    """Counts must be integers of at least 1."""
    if not _is_int(value) or value < 1:
        yield Violation(field, value, "must be an integer of at least 1", "Set it to 1 or more.")


def choice_rule(field: str, value: object, choices: Iterable[str]) -> Iterator[Violation]:
    """Names must be known."""
    known = list(choices)
    if value not in known:
        close = nearest(str(value), known)
        fix = f"Did you mean '{close}'? Use one of {', '.join(known)}."
        yield Violation(field, value, "is unknown", fix)


def layers_rule(field: str, value: object, device: str = "stage") -> Iterator[Violation]:
    """Layers must be a non-empty list of counts, or of -1."""
    numbers = list(value) if isinstance(value, (list, tuple)) else []
    if not numbers or any(not _is_int(number) or number < -1 for number in numbers):
        yield Violation(
            field,
            value,
            f"must be a list with the number of layers on each {device}; those with -1 share the "
            "remaining layers equally",
            "E.g. [3, 7, 7, 7] or [-1, -1].",
        )


def proportions_rule(field: str, values: Any) -> Iterator[Violation]:
    """Proportions must be numbers in (0, 1]."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            yield Violation(
                field, values, f"contains {value!r}, which must be in (0, 1]", "Change it."
            )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most similar to `name`."""
    return get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
