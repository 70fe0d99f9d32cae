"""Atomic writing: a kill at any moment leaves the old file or the new one, never a partial one. Also path checks and
the lock of an output folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lapwan.errors import UserError

LOCK_FILE = ".lapwan.lock"
_TEMPORARY = ".lapwan-tmp-"
_LOCK_SECONDS = 0.5  # a process that ends removes its lock file: a start at that moment tries again


def cache_root() -> Path:
    """The folder of files that lapwan can recreate: $LAPWAN_CACHE_DIR, $XDG_CACHE_HOME/lapwan, or ~/.cache/lapwan."""
    if folder := os.environ.get("LAPWAN_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lapwan"


def _temporary(path: Path) -> Path:
    # The suffix stays at the end: writers such as PyAV choose the container by it.
    return path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")


def is_temporary(path: Path) -> bool:
    """True for a temporary file or folder, such as a killed run leaves behind."""
    return path.name.startswith(_TEMPORARY)


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


def inside(folder: Path, name: object, named_by: Path) -> Path:
    """The path in `folder` of a file whose `name` comes from another file, `named_by`, such as an index of shards.

    Raises:
        UserError: not a plain file name; `../model.safetensors` would read or replace files elsewhere.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise UserError(f"{named_by} names the file {name!r}; only plain file names inside {folder} are allowed, "
                        "without a folder: correct it, or download the file again")
    return folder / name


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`, on failure remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # that of the umask: safetensors' writer makes its files private
        fsync_path(temporary)
        temporary.replace(path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, first_wins: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success fsync its files and rename it to `path`.

    A folder at `path` is replaced: check it with `claim_output` first.

    Args:
        first_wins: a folder that another process has put there meanwhile stays, and this one's is dropped. For what
            every process would make alike, and reads as soon as it is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                fsync_path(file)
        if first_wins:
            try:
                temporary.rename(path)  # in one step: refused where a folder with files is there
            except OSError:
                if not path.is_dir():
                    raise
        elif path.is_dir():
            old = _temporary(path)
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
        fsync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def claim_output(path: Path, overwrite: bool) -> None:
    """Refuse an output that exists unless `overwrite`; an empty folder counts as absent. Call it before the work.

    Raises:
        UserError: the output exists, its parent is a file, or nothing can be written there.
    """
    _check_parent(path)
    if path.is_dir() and all(entry.name == LOCK_FILE for entry in path.iterdir()):
        return
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise UserError(f"output exists: {path}; choose another path or pass --overwrite")


@contextmanager
def folder_lock(folder: Path, enabled: bool = True) -> Iterator[None]:
    """Hold the lock of an output folder, which one process at a time writes to.

    The lock is the system's, on the file `.lapwan.lock` in the folder, which holds `{"host": ..., "pid": ...}` of the
    process. It ends with the process, in any way: a file that a killed process leaves locks nothing. File and folder
    are made if absent; at the end the file is removed, and the folder if nothing was written into it.

    Args:
        enabled: False for no lock: nothing is made, read or removed.

    Raises:
        UserError: another process holds it, nothing can be written there, or the file system has no locks.
    """
    if not enabled:
        yield
        return
    from filelock import FileLock, Timeout

    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    path = _made_folder(folder) / LOCK_FILE
    # No fallback to a file without a system lock: it would outlive a killed process and lock the folder for good.
    lock = FileLock(path, timeout=_LOCK_SECONDS, fallback_to_soft=False, on_acquired=_write_holder)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder} is in use by {_holder(path)}; wait for that process, stop it, or choose another "
                        "output") from None
    except OSError as error:
        _remove_lock_file(path, missing)
        raise UserError(f"cannot lock {folder}: {error.strerror or error}; choose an output on a file system with "
                        "locks, or pass --no-lock and let nothing else write to this folder") from None
    try:
        yield
    finally:
        _remove_lock_file(path, missing)
        lock.release()


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
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode() + b"\n", 0)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on host {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # just made or removed
        return "another process"


def _remove_lock_file(path: Path, made: list[Path]) -> None:
    """Remove the lock file, and the folders made for it that are empty."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()


def _check_parent(path: Path) -> None:
    for parent in path.parents:
        if parent.exists():
            if not parent.is_dir():
                raise UserError(f"cannot write {path}: {parent} is a file, not a folder; choose another output")
            _try_writing(path, parent)
            return


def _try_writing(path: Path, folder: Path) -> None:
    probe = _temporary(folder / "probe")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {folder}: {error.strerror}; choose another output") from None


def nearest_folder(path: Path) -> Path:
    """The nearest existing folder at or above `path`."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
