"""Which errors of the system and of other libraries are the user's to mend, and the line that says so.

`user_error` is what the command line asks of an error that nothing caught. Full disks, denied access, damaged files and
bombs become a `UserError` with the file's name and what to do; anything else is a fault of lapwan and stays as it is.

How to add an error: a row of `_BY_ERRNO` or `_BY_CLASS`, or for a RuntimeError of torch a text of `_TORCH`.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lapwan.errors import UserError

_RETRY = "then run the command again"
_BY_ERRNO: dict[int, str] = {
    errno.ENOSPC: f"the disk is full: free some space or choose another output, {_RETRY}",
    errno.EDQUOT: f"the disk quota is used up: free some space or choose another output, {_RETRY}",
    errno.EFBIG: "the file system takes no file as large as this: choose another output",
    errno.EROFS: "the file system is read-only: choose another output",
    errno.EACCES: "you may not read or write it: change its permissions, or choose another path",
    errno.EPERM: "you may not read or write it: change its permissions, or choose another path",
    errno.EMFILE: f"too many files are open: raise the limit (ulimit -n 4096), {_RETRY}",
    errno.ENFILE: f"too many files are open on this machine: close some programs, {_RETRY}",
    errno.ENAMETOOLONG: "the name is too long for the file system: choose a shorter one",
    errno.EIO: f"the disk reports a fault (EIO): check the disk or the network drive, {_RETRY}",
    errno.ESTALE: f"the network drive has dropped the file: mount it again, {_RETRY}",
    errno.ELOOP: "its symbolic links lead in a circle: correct them",
    errno.EISDIR: "it is a folder; a file is needed here",
    errno.ENOTDIR: "it is a file or lies under one; a folder is needed here",
    errno.ENOENT: "it does not exist; was it removed or renamed?",
    errno.EEXIST: "it exists already; choose another path",
    errno.ENOTEMPTY: "the folder is not empty; choose another path",
    errno.EXDEV: "it lies on another file system; choose another path",
    errno.EBUSY: f"it is in use by another program; close that, {_RETRY}",
    errno.ETXTBSY: f"it is in use by another program; close that, {_RETRY}",
    errno.ENXIO: "the device behind it is not there",
    errno.ENODEV: "it cannot be mapped into memory: copy it to another disk",
    errno.ENOLCK: "the file system has no locks left: choose another output",
    errno.ENOMEM: f"there is not enough memory: close other programs, {_RETRY}",
    errno.EINVAL: "the system refuses it; is the path right, and can this file system hold such a file?",
    errno.ENOTSUP: "the file system cannot do this: choose another path",
    errno.ENOTCONN: f"the network drive is not connected: mount it again, {_RETRY}",
    errno.ETIMEDOUT: f"the network drive does not answer: check it, {_RETRY}",
    errno.EILSEQ: "the file system does not take the characters of this name: choose another one",
}
_DAMAGED = "it is damaged or not the right file: copy or download it again"
_BY_CLASS: dict[str, str] = {  # module.class of an error or of one that it is derived from
    "safetensors._safetensors_rust.SafetensorError": _DAMAGED, "safetensors_rust.SafetensorError": _DAMAGED,
    "pickle.UnpicklingError": f"{_DAMAGED} (nothing in it was executed)",
    "_pickle.UnpicklingError": f"{_DAMAGED} (nothing in it was executed)",
    "json.decoder.JSONDecodeError": "it is not valid JSON: correct it, or download it again",
    "tomllib.TOMLDecodeError": "it is not valid TOML: correct it", "yaml.error.YAMLError": "it is not valid YAML",
    "builtins.UnicodeDecodeError": "it is not UTF-8: save it as UTF-8, or is it the right file?",
    "builtins.UnicodeEncodeError": "it holds halves of surrogate pairs, which cannot be written: remove them",
    "PIL.Image.DecompressionBombError": "the image has too many pixels: make it smaller",
    "PIL.UnidentifiedImageError": "it is no image that can be read: save it as PNG or JPEG",
    "av.error.FFmpegError": "it is no video that can be read: convert it to MP4 (H.264)",
    "zipfile.BadZipFile": _DAMAGED, "zipfile.LargeZipFile": _DAMAGED, "zlib.error": _DAMAGED,
    "lzma.LZMAError": _DAMAGED, "gzip.BadGzipFile": _DAMAGED, "tarfile.TarError": _DAMAGED,
    "builtins.MemoryError": "there is not enough memory for it: close other programs, or ask for less",
}
# What torch says of a file as a RuntimeError; any other RuntimeError is a fault of ours.
_TORCH = re.compile(r"PytorchStream(Reader|Writer)|inline_container|[Uu]nexpected EOF|Invalid magic number|"
                    r"unable to (mmap|open file)|file in archive is not in a subdirectory|storage has wrong byte size")
_CANNOT_WRITE = re.compile(r"PytorchStreamWriter|basic_ios::clear")  # torch says no more than that
_LINK_LOOP = re.compile(r"Symlink loop from '(.*)'")  # of pathlib before Python 3.13
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory")
_PARSERS = ("json", "tomllib", "yaml", "pydantic", "pickle", "re", "ast", "copy")  # deep values, not deep programs
_OS_ERROR = re.compile(r"os error (\d+)")  # as libraries in Rust end their messages
_NAMES = ("path", "file", "config", "source", "target", "output", "folder", "temporary", "run")


def user_error(error: BaseException) -> UserError | None:
    """What the user can do about an error, as a `UserError`; None for a fault of lapwan's own.

    Args:
        error: as it was caught, with its traceback: the file is the one of the error, else that of the function of
            lapwan in which it happened.
    """
    advice = _advice(error)
    if advice is None:
        return None
    file = _file(error)
    text = str(error).strip().splitlines()
    if link := _LINK_LOOP.search(str(error)):
        file, text = link[1], []
    stated = f" ({text[0]})" if text and not isinstance(error, OSError | UnicodeError | MemoryError) else ""
    nameless = "the output" if isinstance(error, OSError) else "a file"
    return UserError(f"{file or nameless}: {advice}{stated}")


# What the classes of diffusers and transformers raise for files that do not fit them.
_MISFITS = (OSError, ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError,
            AssertionError, ImportError)  # the last: a config that asks for a package which is not there


_SMALL = (".json", ".txt", ".model")


@contextmanager
def library_reads(what: str, path: Path) -> Iterator[None]:
    """A call of another library that builds `what` of the files at `path`: its errors say what is wrong with them.

    Its small files are sized before, since the library reads them whole.

    Raises:
        UserError: an error of the library, but not of lapwan, of a full disk or of memory; a file that is too large.
    """
    from lapwan.documents import TOKENIZER_BYTES  # pydantic, which no help needs

    for file in sorted(path.iterdir()) if path.is_dir() else ():
        if file.suffix in _SMALL and file.exists() and (not file.is_file() or file.stat().st_size > TOKENIZER_BYTES):
            raise UserError(f"cannot read {what} in {path}: {file.name} is no file of at most {TOKENIZER_BYTES >> 20} "
                            "MiB; is it the right one? Download it again")
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        foreign = type(error).__module__.split(".")[0] not in ("lapwan", "builtins") or type(error) is Exception
        if not (foreign or isinstance(error, _MISFITS)) or type(error).__name__ == "OutOfMemoryError" \
                or getattr(error, "errno", None) is not None:
            raise
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read {what} in {path}: {text}; is it complete? Download it again") from error


def quiet_system_errors_of_threads() -> None:
    """A full disk in another library's writing thread (TensorBoard's) reaches the main thread at its next write, which
    says it in a line: the thread itself prints no traceback before."""
    def on_error(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            threading.__excepthook__(arguments)

    threading.excepthook = on_error


def _advice(error: BaseException) -> str | None:
    if isinstance(error, RecursionError):
        return "its values are nested too deep: is it the right file?" if _in_parser(error) else None
    code = getattr(error, "errno", None) if isinstance(error, OSError) else None
    for kind in type(error).__mro__:
        if (advice := _BY_CLASS.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            if match := _OS_ERROR.search(str(error)):  # safetensors on a full disk
                code = int(match[1])
            return _BY_ERRNO.get(code or 0, advice)
    if code is not None:
        return _BY_ERRNO.get(code)
    if isinstance(error, EOFError):
        return _DAMAGED
    if isinstance(error, RuntimeError):
        if _LINK_LOOP.search(str(error)):
            return _BY_ERRNO[errno.ELOOP]
        if _CANNOT_WRITE.search(str(error)):
            return _BY_ERRNO[errno.ENOSPC] if _full(error) else f"it cannot be written: check the disk, {_RETRY}"
        if _TORCH.search(str(error)):
            return _DAMAGED
        if _NO_MEMORY.search(str(error)):
            return _BY_CLASS["builtins.MemoryError"]
    return None


def _full(error: BaseException) -> bool:
    file = _file(error)
    folder = next((p for p in Path(file).absolute().parents if p.is_dir()), None) if file else None
    if folder is None or not hasattr(os, "statvfs"):
        return False
    return os.statvfs(folder).f_bavail == 0


def _frames(error: BaseException) -> Iterator[tuple[str, dict[str, object]]]:
    """(module, local variables) of the traceback's frames, innermost first."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        yield frame.f_globals.get("__name__", ""), frame.f_locals


def _in_parser(error: BaseException) -> bool:
    innermost = next((name for name, _ in _frames(error)), "")
    return innermost.split(".")[0] in _PARSERS or innermost == "torch._weights_only_unpickler"


def _file(error: BaseException) -> str | None:
    """The file that an error names, else that of lapwan's innermost function that works on one."""
    if (name := getattr(error, "filename", None)) is not None:
        return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else str(name)
    for module, variables in _frames(error):
        if module.split(".")[0] == "lapwan":
            for key in _NAMES:
                value = variables.get(key)
                value = value if isinstance(value, Path) else getattr(value, "path", None)
                if isinstance(value, Path):
                    return str(value)
    return None
