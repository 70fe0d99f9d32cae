"""The exception for errors that a user can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix: printed as one line `error: ...`, exit code 2, no traceback.

    The message says what is wrong (with the value), what is allowed, and what to do.
    """


class Interrupted(Exception):
    """The user pressed Ctrl-C and the state is saved, or a callback cancelled a video: printed as one line, exit
    code 130.

    Args:
        message: what is kept and, without `again`, how to continue.
        again: the option with which the same command continues, such as `--resume`; "" for none: the command line adds
            the whole command to the message.
    """

    def __init__(self, message: str, again: str | None = None) -> None:
        super().__init__(message)
        self.again = again


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest word of `known`, to append to a message; empty if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
