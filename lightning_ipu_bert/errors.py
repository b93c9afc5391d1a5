"""The one kind of error that is meant for users."""

from __future__ import annotations


class UserError(ValueError):
    """A value that a user gave breaks a rule.

    The message is one line and gives the value, the rule and the way out. The command line prints
    it without a traceback and ends with exit code 2.
    """
