"""Errors of the system and of other libraries are one line with the file's name; lapwan's own keep their traceback."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import subprocess
import sys
import tomllib
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from command_line import run_lapwan
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError

from lapwan.commands import label
from lapwan.errors import UserError, one_line, printable
from lapwan.faults import library_reads, user_error


def raised(function: Callable[[], object]) -> BaseException:
    try:
        function()
    except BaseException as error:  # noqa: BLE001  whichever it is
        return error
    raise AssertionError("nothing was raised")


SYSTEM = ("ENOSPC", "EROFS", "EACCES", "EPERM", "EMFILE", "ENFILE", "ENAMETOOLONG", "EIO", "EDQUOT", "ELOOP", "EISDIR",
          "ENOTDIR", "ESTALE")


@pytest.mark.parametrize("name", SYSTEM)
def test_errors_of_the_system_name_the_file(name: str) -> None:
    code = getattr(errno, name)
    error = user_error(OSError(code, os.strerror(code), "/data/a.safetensors"))
    assert error is not None and str(error).startswith("/data/a.safetensors: ")


def _bytes(path: Path) -> bytes:
    return path.read_bytes()


FAULTS: dict[str, Callable[[Path], object]] = {
    "JSON": lambda path: json.loads(_bytes(path)), "TOML": lambda path: tomllib.loads("a = ="),
    "YAML": lambda path: yaml.safe_load("[a"), "UTF-8": lambda path: b"\xff".decode(),
    "surrogates": lambda path: "\ud800".encode(), "pickle": lambda path: pickle.loads(_bytes(path)),
    "zip": zipfile.ZipFile, "zlib": lambda path: zlib.decompress(_bytes(path)), "image": Image.open,
    "torch": lambda path: torch._C.PyTorchFileReader(str(path)), "deep JSON": lambda path: json.loads("[" * 100_000),
    "safetensors": lambda path: (_ for _ in ()).throw(SafetensorError("invalid header")),
    "full disk in Rust": lambda path: (_ for _ in ()).throw(
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
    "failed write of torch": lambda path: (_ for _ in ()).throw(RuntimeError("basic_ios::clear: iostream error")),
    "a loop of links": lambda path: (_ for _ in ()).throw(RuntimeError(f"Symlink loop from '{path}'")),
    "memory": lambda path: bytearray(2**62), "a folder": lambda path: path.parent.read_bytes(),
}


@pytest.mark.parametrize("name", FAULTS)
def test_errors_of_libraries_name_the_file_that_lapwan_was_reading(name: str, tmp_path: Path, monkeypatch) -> None:
    """The error itself knows no file; the function of lapwan that was at work has it as `path`."""
    path = tmp_path / "damaged.bin"
    path.write_bytes(b"\x80\x04no")
    module = {"__name__": "lapwan.reader", "read": FAULTS[name]}
    exec("def work(path):\n    return read(path)", module)
    error = user_error(raised(lambda: module["work"](path)))
    assert error is not None, name
    message = str(error)
    assert message.startswith(str(tmp_path if name == "a folder" else path)) and len(message.splitlines()) == 1, message
    assert ("disk is full" in message) == (name == "full disk in Rust")


def _endless() -> None:
    _endless()


@pytest.mark.parametrize("fault", [
    lambda: torch.ones(2, 3) @ torch.ones(2, 3), lambda: {}["absent"], lambda: [][0], lambda: None.absent,
    lambda: int("a"), lambda: 1 / 0, lambda: "a" + 1, _endless,
])
def test_faults_of_lapwan_stay_what_they_are(fault: Callable[[], object], monkeypatch, tmp_path: Path) -> None:
    assert user_error(raised(fault)) is None
    monkeypatch.setattr(label, "run", lambda *_: fault())
    (tmp_path / "c.jsonl").write_text('{"caption": "a"}\n')
    with pytest.raises(type(raised(fault))):
        run_lapwan("label", tmp_path / "c.jsonl", "-o", tmp_path / "l.jsonl")


def test_a_library_that_builds_from_files_says_which() -> None:
    with pytest.raises(UserError, match=r"cannot read the VAE in /model/vae: size mismatch"), \
            library_reads("the VAE", Path("/model/vae")):
        raise RuntimeError("size mismatch\nfor conv")
    with pytest.raises(UserError, match="cannot read the VAE"), library_reads("the VAE", Path("/model/vae")):
        raise zipfile.BadZipFile("a class of the library's own")
    for kept in (OSError(errno.ENOSPC, "full"), torch.OutOfMemoryError("CUDA"), UserError("said"), KeyboardInterrupt()):
        with pytest.raises(type(kept)), library_reads("the VAE", Path("/model/vae")):
            raise kept


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_output_is_a_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run([sys.executable, "-m", "lapwan", "--version"], stdout=full, stderr=subprocess.PIPE,
                             text=True)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "the disk is full" in ran.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
@pytest.mark.parametrize(("command", "code"), [
    ("{} label none.jsonl -o l.jsonl 2>&1 | true", 141), ("{} --help | true", 141),
    ("{} label none.jsonl -o l.jsonl 2>&-", 2), ("{} --version >&-", 0)])
def test_closed_streams_end_it_without_a_word(command: str, code: int, tmp_path: Path) -> None:
    script = f"set -o pipefail; {command.format(f'{sys.executable} -m lapwan')}"
    ran = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout + ran.stderr) == (code, "")


@given(st.text(st.characters(codec=None), max_size=400), st.text(max_size=5))
def test_a_message_is_one_line_that_a_terminal_only_shows(value: str, word: str) -> None:
    for message in (f"{word}{value}", f"key = {value!r}: must be a number", f"{value * 50}"):
        line = one_line(message)
        assert line.splitlines() in ([line], []) and len(line) <= 2000
        assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in line)
        line.encode("utf-8")
        assert one_line(line) == line


def test_values_are_cut_and_text_is_not() -> None:
    text = "the model's files aren't here: " + "plain words of ours, " * 40
    assert one_line(text) == text
    long = "x" * 50_000_000
    assert one_line(f"/data/{long}/model.safetensors is no file").endswith("/model.safetensors is no file")
    for value in (long, repr(f"a caption {long}"), "字" * 500):
        assert 100 < len(one_line(f"key = {value}: must be a number")) < 300
    assert one_line("电凝钩　切割组织") == "电凝钩　切割组织"
    assert str(UserError("a\nb\x1b[31m\u202ec", "  d\re")) == "a\\nb\\x1b[31m\\u202ec\n  d\\re"
    assert printable("a\u00a0b") == "a\u00a0b"


def test_an_error_keeps_its_details_when_it_is_sent_and_placed() -> None:
    error = UserError("2 problems:", "  a", "  b")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "2 problems:\n  a\n  b"
    assert str(error.within("line 3")) == "line 3: 2 problems:\n  a\n  b"
    assert io.StringIO(str(error.within("x"))).readline() == "x: 2 problems:\n"
