"""How every command talks to the terminal: one console, and one line and an exit code for what went wrong."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from rich.console import Console

from jaxroute.errors import UserError

# What the machine refuses a program, through no fault of it.
_REFUSED = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EIO,
)  # fmt: skip


def run_with_console(run: Callable[[Console], None]) -> int:
    """Run a command; returns the exit code, 2 after an error of the user's or the machine's, printed on one line."""
    # A plain, wide console where nobody watches, so that logs hold whole lines. A path may have :smile: in it.
    console = Console(width=None if sys.stdout.isatty() else 120, emoji=False)
    try:
        run(console)
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # Whoever read the output has seen enough. Python would complain once more when it closes the output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return _fail(f"{error.filename or 'a file'}: {error.strerror}")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Exception as error:
        from jaxroute.devices import unusable_platform

        if (line := unusable_platform(error)) is None:
            raise
        return _fail(line)
    return 0


def say(console: Console, text: str) -> None:
    """Print text as it is, on one line however long, so that what stands in it can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _fail(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2
