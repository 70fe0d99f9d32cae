"""Atomic writing: a kill at any moment leaves the old file or the new one, never a partial one. Also path checks and
the lock of an output folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PureWindowsPath
from typing import TypeGuard

from lapwan.console import listed, log
from lapwan.errors import UserError
from lapwan.temporaries import (
    NO_LOCKS,
    finished,
    fsync_path,
    put,
    remove_stale,
    remove_stale_once,
    settle,
    temporary_folder,
    try_lock,
    unlock,
)
from lapwan.temporaries import is_temporary as is_temporary

_SHOWN = 3  # paths named in a message
LOCK_FILE = ".lapwan.lock"
_NAME_BYTES = 255  # of a file's name, on every usual file system


def cache_root() -> Path:
    """The folder of files that lapwan can recreate: $LAPWAN_CACHE_DIR, $XDG_CACHE_HOME/lapwan, or ~/.cache/lapwan."""
    if folder := os.environ.get("LAPWAN_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lapwan"


_EXPANDED = re.compile(r"(?:~[\w.-]*|\$\w+|\$\{\w+\})(?=/|$)")


def expand_user(path: str | Path) -> Path:
    """A path as a user wrote it: a leading `~`, and `$NAME` or `${NAME}` of the environment, are filled in.

    What is not set stays as it is written, and so does a path that exists as it is written.
    """
    text = str(path)
    if not (text.startswith("~") or "$" in text) or "\0" in text or os.path.lexists(text):
        return Path(path)
    expanded = Path(os.path.expandvars(text))
    try:
        return expanded.expanduser()
    except RuntimeError:  # no such user
        return expanded


def expand_setting(value: str) -> str:
    """A setting's text with a leading `~` or variable filled in, as a shell does: `~/models`, `high=$RUNS/a`.

    Only at the begin, or after the `name=` of an argument: a `~` inside a text is its own.
    """
    name, equals, _ = value.partition("=")
    start = f"{name}=" if equals and name.isidentifier() else ""
    return start + str(expand_user(value[len(start):])) if _EXPANDED.match(value, len(start)) else value


def is_plain_name(name: object) -> TypeGuard[str]:
    """Whether a name that a file gives is that of a file in its folder: no path, on any system, and not too long."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        return False
    try:
        return len(os.fsencode(name)) <= _NAME_BYTES and not PureWindowsPath(name).drive
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def leaves(path: Path, folder: Path) -> bool:
    """Whether `path` is a symbolic link, or lies under one, that leads out of `folder`."""
    return not path.resolve().is_relative_to(folder.resolve())


def check_targets(folder: Path, targets: Iterable[Path]) -> None:
    """Refuse to write where a name or a link leads out of `folder`, the output; call it before the first is written.

    Raises:
        UserError: one of the targets lies elsewhere.
    """
    for target in targets:
        if leaves(target, folder):
            raise UserError(f"{target} leads out of the output {folder}; nothing is written there")


def inside(folder: Path, name: object, named_by: Path) -> Path:
    """The path in `folder` of a file whose `name` comes from another file, `named_by`, such as an index of shards.

    Raises:
        UserError: not a plain file name; `../model.safetensors` would read or replace files elsewhere.
    """
    if not is_plain_name(name):
        raise UserError(f"{named_by} names the file {name!r}; only plain file names inside {folder} are allowed, "
                        "without a folder: correct it, or download the file again")
    return folder / name


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path on the same disk; on success flush it and rename it to `path`, on failure remove it.

    The file's permissions are those of the umask, whatever its writer gave it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_once(path.parent)
    with temporary_folder(path.parent) as folder:
        temporary = folder / path.name
        yield temporary
        settle(temporary)
        put(temporary, path)


@contextmanager
def atomic_folder(path: Path, first_wins: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder on the same disk; on success flush all in it and rename it to `path`.

    A folder at `path` is replaced: check it with `claim_output` first. Permissions are those of the umask.

    Args:
        first_wins: a folder that another process has put there meanwhile stays, and this one's is dropped. For what
            every process would make alike, and reads as soon as it is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_once(path.parent)
    with temporary_folder(path.parent) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        settle(temporary)
        if not first_wins:
            put(temporary, path)
            return
        try:
            temporary.rename(path)  # in one step: refused where a folder with files is there
        except OSError:
            if not path.is_dir():
                raise
        fsync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def forget_finished() -> None:
    """Start the list of `finished_text` anew: a command begins."""
    finished.clear()


def was_written(path: Path) -> bool:
    """Whether this command has written a file or folder whole."""
    return path.absolute() in {other.absolute() for other in finished}


def finished_text() -> str:
    """`written: A, B and 3 more` of what this command has written whole; empty if there is nothing."""
    made = [path for path in dict.fromkeys(finished) if not path.absolute().is_relative_to(cache_root().absolute())]
    return f"written: {listed(made, _SHOWN)}" if made else ""


def claim_output(path: Path, overwrite: bool) -> None:
    """Refuse an output that exists unless `overwrite`; an empty folder counts as absent. Call it before the work.

    Raises:
        UserError: the output exists, its parent is a file, or nothing can be written there.
    """
    _check_parent(path)
    remove_stale_once(path.parent)
    if path.is_dir() and all(entry.name == LOCK_FILE for entry in path.iterdir()):
        return
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise UserError(f"output exists: {path}; choose another path or pass --overwrite")


@contextmanager
def folder_lock(folder: Path, enabled: bool = True) -> Iterator[None]:
    """Hold the lock of an output folder, which one process at a time writes to; remove what killed ones have left.

    The lock is the system's, on the file `.lapwan.lock` in the folder, which holds `{"host": ..., "pid": ...,
    "command": ..., "since": ...}` of the process and stays, emptied, when it ends. The lock ends with the process, in
    any way: the file of a killed process, on this host or another, locks nothing. Folder and file are made if absent,
    and removed at the end where nothing else was written.

    Args:
        enabled: False for no lock: nothing is made, read or removed.

    Raises:
        UserError: another process holds it, nothing can be written there, or the file system has no locks.
    """
    if not enabled:
        yield
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    path = _made_folder(folder) / LOCK_FILE
    try:
        descriptor = try_lock(path)
        if descriptor is not None:
            _take_over(folder, path, descriptor)
    except OSError as error:
        _remove_lock_file(path, missing)
        if error.errno not in NO_LOCKS:
            raise UserError(f"cannot write {path}: {error.strerror or error}; choose another output") from None
        raise UserError(f"cannot lock {folder}: {error.strerror or error}; choose an output on a file system with "
                        "locks, or pass --no-lock and let nothing else write to this folder") from None
    if descriptor is None:
        raise UserError(f"{folder} is in use by {_holder(path)}; wait for that process, stop it, or choose another "
                        "output")
    try:
        yield
    finally:
        os.truncate(descriptor, 0)
        _remove_lock_file(path, missing)
        unlock(descriptor)


def _take_over(folder: Path, path: Path, descriptor: int) -> None:
    """Write this process into the lock file; remove what the one that it still names was killed in writing."""
    if os.fstat(descriptor).st_size:
        log(f"{folder}: {_holder(path)} has ended without finishing")
    try:
        _write_holder(descriptor)
    except OSError:
        unlock(descriptor)
        raise
    remove_stale(folder)


def _made_folder(folder: Path) -> Path:
    """`folder`, made with its parents if absent and tried for writing."""
    _check_parent(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output exists: {folder} is a file, not a folder; choose another output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another output") from None
    _try_writing(folder, folder)
    return folder


def _write_holder(descriptor: int) -> None:
    """A whole line in one write: readers see the old one or the new one."""
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "command": shlex.join(sys.argv),
              "since": datetime.now(UTC).isoformat(timespec="seconds")}
    line = json.dumps(holder).encode() + b"\n"
    os.pwrite(descriptor, line, 0)
    os.truncate(descriptor, len(line))
    os.fsync(descriptor)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        since = f" since {holder['since']}" if "since" in holder else ""
        return f"process {holder['pid']} on host {holder['host']}{since}"
    except (OSError, ValueError, KeyError, TypeError):  # just made or emptied
        return "another process"


def _remove_lock_file(path: Path, made: list[Path]) -> None:
    """Remove a lock file that is alone in its folder, and the folders made for it that are empty."""
    with suppress(OSError):
        if all(entry.name == LOCK_FILE for entry in os.scandir(path.parent)):
            path.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()


def _check_parent(path: Path) -> None:
    for parent in path.parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise UserError(f"cannot write {path}: {parent} is not a folder; choose another output")
            _try_writing(path, parent)
            return


def _try_writing(path: Path, folder: Path) -> None:
    try:
        with temporary_folder(folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {folder}: {error.strerror}; choose another output") from None


def nearest_folder(path: Path) -> Path:
    """The nearest existing folder at or above `path`."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
