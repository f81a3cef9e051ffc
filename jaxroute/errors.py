"""How a user's mistake is reported."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: configuration, data, a checkpoint.

    The message is one line that says what is wrong, where, and what to do. The
    command line prints it without a stack trace and exits with code 2.
    """


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """Return " (did you mean X?)" with the known name that `closest` finds, or ""."""
    near = closest(name, known)
    return "" if near is None else f" (did you mean {near}?)"


def closest(name: object, known: Iterable[object]) -> str | None:
    """Return the known name that is most like `name`, ignoring case, or None if none is like it."""
    by_lower_case = {str(candidate).lower(): str(candidate) for candidate in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower_case, n=1)
    return by_lower_case[near[0]] if near else None
