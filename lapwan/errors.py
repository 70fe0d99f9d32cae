"""The one exception for what a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: printed as one line `error: ...`, exit code 2, no traceback.

    The message says what is wrong (with the value), what is allowed, and what to do.
    """


class Interrupted(Exception):
    """The user pressed Ctrl-C and the state is saved: printed as one line, exit code 130.

    The message says how to go on.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `known`, or an empty string: to append to a message."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
