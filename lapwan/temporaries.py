"""Temporary folders with a lock of the process that writes there, and the removal of those of dead processes.

    out/.lapwan-tmp-1f2e3d4c/.lock   held by the process; the system frees it when the process ends in any way
    out/.lapwan-tmp-1f2e3d4c/NAME    written and flushed, then renamed to out/NAME or exchanged with it
    out/.lapwan-tmp-1f2e3d4c/.old    what NAME replaces, where the system cannot exchange two names

A folder and not a file: some writers (safetensors' is one) write a file of their own beside the path they are given
and rename it, which would lose a lock on the file and leave theirs behind after a kill.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lapwan.console import log, warn
from lapwan.interrupt import postponed

_PREFIX = ".lapwan-tmp-"
_LOCK, _OLD = ".lock", ".old"
_RENAME_EXCHANGE, _CURRENT_FOLDER = 2, -100  # of Linux: renameat2's flag and AT_FDCWD
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # of a file system that cannot lock
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)
_live: set[Path] = set()  # of this process
_locked: set[int] = set()
finished: list[Path] = []  # files and folders that this process has written whole
_of_workers: set[Path] = set()  # folders in which this process's workers write
_swept: set[Path] = set()  # folders in which this process has looked for temporaries of dead ones


def is_temporary(path: Path) -> bool:
    """True for a temporary folder, such as a killed run leaves behind."""
    return path.name.startswith(_PREFIX)


def try_lock(path: Path) -> int | None:
    """The descriptor of a file that this process has locked until it closes it; None: another process has.

    The file is made if absent. It may be removed while it is locked: who had it open by then tries the new file.

    Raises:
        OSError: it cannot be made, or the file system has no locks.
    """
    from filelock import lock_descriptor

    while True:
        descriptor = _open(path)
        try:
            if not lock_descriptor(descriptor, blocking=False):
                os.close(descriptor)
                return None
            if _is_at(descriptor, path):
                _locked.add(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def unlock(descriptor: int) -> None:
    """Close what `try_lock` returned, which frees the lock."""
    _locked.discard(descriptor)
    os.close(descriptor)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # another user's: enough to see whether it is locked


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, locked, with the permissions of the umask; removed at the end."""
    folder, descriptor = _locked_folder(parent)
    try:
        yield folder
    finally:
        with postponed():  # a second signal, or the first one in the middle of a large file's removal
            remove_live(folder)
            if descriptor is not None:
                unlock(descriptor)
                remove_live(folder)  # where the process had no descriptor left to list it with


def _locked_folder(parent: Path) -> tuple[Path, int | None]:
    while True:
        folder = parent.absolute() / f"{_PREFIX}{uuid.uuid4().hex[:8]}"
        _live.add(folder)
        try:
            folder.mkdir()
            try:
                return folder, try_lock(folder / _LOCK)
            except FileNotFoundError:  # another process has removed the folder, which was empty and not yet locked
                _live.discard(folder)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return folder, None  # nobody can tell whose it is: `remove_stale` leaves it
            with suppress(OSError):
                folder.rmdir()  # empty; without a descriptor left it could not be listed
            remove_live(folder)
            raise
        except BaseException:
            remove_live(folder)
            raise


def is_untouched() -> bool:
    """Whether this process holds no lock, has written nothing and is writing nothing: it can end without a word."""
    return not (_live or finished or _locked)


def remove_live(folder: Path | None = None) -> None:
    """Remove a temporary folder of this process, or all of them: nothing is finished any more."""
    for path in list(_live) if folder is None else [folder]:
        with suppress(OSError):
            _remove(path)
        _live.discard(path)


def workers_write_in(folder: Path) -> None:
    """Note a folder in which workers of this process write: those of an interrupted command are killed."""
    _of_workers.add(folder.absolute())


def remove_of_workers() -> None:
    """Remove what killed workers of this process were writing."""
    for folder in _of_workers:
        for path in folder.glob(f"{_PREFIX}*"):
            if path not in _live:
                _take(path)


def remove_stale_once(parent: Path) -> None:
    """`remove_stale`, if this process has not done so in this folder."""
    if parent.absolute() not in _swept:
        remove_stale(parent)


def remove_stale(parent: Path) -> None:
    """Remove the temporary folders of dead processes in `parent`, and finish an exchange in which one died.

    What may belong to a process that lives is left and named: a file of an older version, or any where the file system
    has no locks.
    """
    _swept.add(parent.absolute())
    try:
        entries = [Path(entry.path) for entry in os.scandir(parent.absolute()) if entry.name.startswith(_PREFIX)]
    except OSError:
        return
    removed = 0
    for path in entries:
        if path in _live:
            continue
        stale = _take(path)
        removed += stale is True
        if stale is None:
            warn(f"{path} was left by a killed process, or is being written; remove it if nothing writes there")
    if removed:
        log(f"{parent}: removed {removed} unfinished {'output' if removed == 1 else 'outputs'} of killed processes")


def _take(path: Path) -> bool | None:
    """Remove a temporary of a dead process. False: its process lives, or has just removed it; None: nobody can tell."""
    if not path.is_dir() or path.is_symlink():
        return None if path.exists() else False
    try:
        if not (path / _LOCK).exists():
            with suppress(OSError):  # not empty: its lock has just been made
                path.rmdir()  # killed before its lock was made, or after that was removed
                return True
            return False
        descriptor = try_lock(path / _LOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    if descriptor is None:
        return False
    try:
        _finish(path)
        return True
    except OSError:
        return None
    finally:
        unlock(descriptor)


def _finish(folder: Path) -> None:
    """Put a whole new folder where the old one was, if its process died between the two renames; then remove."""
    if (folder / _OLD).exists():
        for entry in folder.iterdir():
            if entry.name not in (_LOCK, _OLD) and not os.path.lexists(target := folder.parent / entry.name):
                entry.rename(target)
                warn(f"{target}: finished its replacement, in which a process was killed")
    _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a temporary folder, the lock last: what a kill leaves meanwhile is recognised by it."""
    for entry in folder.iterdir():
        if entry.name != _LOCK:
            _remove_entry(entry)
    (folder / _LOCK).unlink(missing_ok=True)
    folder.rmdir()


def _remove_entry(path: Path) -> None:
    """Remove a file or tree with one descriptor at a time: shutil.rmtree holds one for every level."""
    if path.is_dir() and not path.is_symlink():
        for entry in path.iterdir():
            _remove_entry(entry)
        path.rmdir()
    else:
        path.unlink()


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle(path: Path) -> None:
    """Give a written file or tree the permissions of the umask and flush it, folders after their contents.

    A hard link is left as it is: its file is also somebody else's.
    """
    folder_mode = stat.S_IMODE(path.parent.stat().st_mode)
    lock = path.parent / _LOCK
    file_mode = stat.S_IMODE(lock.stat().st_mode) if lock.exists() else folder_mode & 0o666
    for root, _, names in os.walk(path, topdown=False):
        for name in names:
            _settle_file(Path(root, name), file_mode)
        _set_mode(Path(root), folder_mode)
        fsync_path(Path(root))
    if not path.is_dir():
        _settle_file(path, file_mode)


def _settle_file(path: Path, mode: int) -> None:
    status = path.lstat()
    if stat.S_ISREG(status.st_mode):
        if status.st_nlink == 1:
            _set_mode(path, mode)
        fsync_path(path)


def _set_mode(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def put(source: Path, target: Path) -> None:
    """Rename a settled file or folder of a temporary folder to `target`, which it replaces in one step.

    A folder cannot be renamed onto one with files: the two exchange their names (renameat2), or, where the system or
    the file system cannot, the old one goes first, and `remove_stale` finishes what a kill in between leaves.
    """
    with postponed():  # what an interrupted command says it has finished is what is there
        if not (source.is_dir() and os.path.lexists(target)):
            source.rename(target)
        elif not _exchange(source, target):
            target.rename(source.with_name(_OLD))
            source.rename(target)
        if not any(is_temporary(folder) for folder in target.parents):
            finished.append(target)
    fsync_path(target.parent)


def _exchange(source: Path, target: Path) -> bool:
    """Exchange two names in one step; False where that is not possible."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or an older C library
        return False
    names = os.fsencode(source), os.fsencode(target)
    if renameat2(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(target))


def discard_folder(folder: Path) -> None:
    """Remove a folder of ours in one step: a kill while its files are removed leaves none that is incomplete."""
    with suppress(FileNotFoundError), temporary_folder(folder.parent) as temporary:
        folder.rename(temporary / folder.name)
