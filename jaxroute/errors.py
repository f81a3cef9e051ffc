"""The one exception that reports a user's mistake."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: configuration, data, a checkpoint.

    The message is one line that says what is wrong, where, and what to do. The
    command line prints it without a stack trace and exits with code 2.
    """
