"""The exceptions for errors that a user can fix, and how their messages are shown."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable

_VALUE = 200  # characters of a value that a message shows
_LINE = 2000  # characters of a line of a message
_HEAD = 0.7  # share of them that is taken from the beginning
_MARK = 40  # characters for what says that some are left out
_LONG_WORD = re.compile(rf"[^\s'\"]{{{_VALUE + 1},}}")
_LONG_QUOTED = re.compile(rf"(?<!\w)(?:'[^'\n]{{{_VALUE + 1},}}'|\"[^\"\n]{{{_VALUE + 1},}}\")(?!\w)")


class UserError(Exception):
    """An error that the user can fix: printed as one line `error: ...`, exit code 2, no traceback.

    The message says what is wrong (with the value), what is allowed, and what to do. It is shown as `one_line` gives
    it, so that a value read from a file can neither end the line nor fill the screen.

    Args:
        message: the line.
        details: further lines, such as each of several problems.
    """

    def __init__(self, message: str, *details: str) -> None:
        super().__init__(message, *details)

    def __str__(self) -> str:
        return "\n".join(map(one_line, self.args))

    def within(self, source: str) -> UserError:
        """The same error with `source: ` in front, such as the line of a file whose values it is about."""
        message, *details = self.args
        return UserError(f"{source}: {message}", *details)


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
    close = difflib.get_close_matches(word[:_VALUE], list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def printable(text: str) -> str:
    """`text` with characters that a terminal acts on as escapes: `\\n`, `\\x1b`, `\\u202e`.

    These are control characters, line separators, marks of the direction of writing, and halves of surrogate pairs;
    every kind of space stays.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or unicodedata.category(char) == "Zs"
                   else char.encode("unicode_escape").decode("ascii") for char in text)


def one_line(text: str) -> str:
    """`text` as one line of at most 2,000 characters: `printable`, and values cut at 200 characters.

    A value is a text in quotes, or one without a space, such as a path; its beginning and its end are shown.
    """
    # Cut before escapes make it longer, since it may have 50 MB, and after.
    return _cut(_values_cut(printable(_cut(_values_cut(text), _LINE))), _LINE)


def _values_cut(text: str) -> str:
    text = _LONG_QUOTED.sub(lambda match: _cut(match[0], _VALUE), text)
    return _LONG_WORD.sub(lambda match: _cut(match[0], _VALUE), text)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    kept = limit - _MARK
    head = int(kept * _HEAD)
    return f"{text[:head]}[... {len(text) - kept} characters ...]{text[len(text) - (kept - head):]}"
