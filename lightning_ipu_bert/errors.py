"""The error for values that a user can correct."""

from __future__ import annotations


class UserError(ValueError):
    """A value given by the user is invalid.

    The message is one line: the value, the rule and how to fix it. The command line prints it
    without a traceback and exits with code 2.
    """
