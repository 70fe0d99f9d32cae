"""Temporaries of killed processes, folders replaced in one step, permissions by the umask."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from forkserver import PATIENCE, fork_server
from safetensors.torch import save_file

from lapwan.files import LOCK_FILE, atomic_file, atomic_folder, claim_output, folder_lock
from lapwan.temporaries import is_temporary, remove_stale

# What a killed process may have been about to do to the disk: audited before it happens.
_CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "ctypes.call_function")


def _without_exchange(*_: object, **__: object) -> object:
    raise OSError("no C library")


def _replace(path: Path, kill_at: int, exchange: bool) -> None:
    """Replace a folder by another; SIGKILL before the `kill_at`-th change to the disk. Exits with 0 if none is left."""
    if not exchange:
        ctypes.CDLL = _without_exchange  # type: ignore[assignment, misc]
    seen = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _CHANGES and (event != "open" or str(path.parent) in str(arguments[0])):
            seen += 1
            if seen > kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    with atomic_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "weights").write_text("new")


def _ended(work: Callable[..., None], *arguments: Any) -> int:
    process = fork_server().Process(target=work, args=arguments)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode is not None
    return process.exitcode


def _fill_without_descriptors(folder: Path) -> None:
    """Use up the descriptors in a temporary folder with a temporary in it, then leave both."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    taken = []
    with suppress(OSError), atomic_folder(folder / "out") as temporary:
        (temporary / "step" / "state").mkdir(parents=True)
        with atomic_file(temporary / "step" / "weights"):
            while True:
                taken.append(os.dup(2))


def test_temporaries_are_removed_when_no_descriptor_is_left(tmp_path: Path) -> None:
    assert _ended(_fill_without_descriptors, tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_before_any_step_of_a_replacement_the_folder_is_whole_after_the_next_start(exchange, tmp_path) -> None:
    path = tmp_path / "merged"
    outcomes = []
    for kill_at in range(1000):
        with atomic_folder(path) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / "weights").write_text("old")
        code = _ended(_replace, path, kill_at, exchange)
        if exchange:  # at no moment is there no folder
            assert (path / "inner" / "weights").read_text() in ("old", "new")
        remove_stale(tmp_path)
        outcomes.append((path / "inner" / "weights").read_text())
        assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert len(outcomes) > 8 and outcomes == sorted(outcomes, reverse=True) and set(outcomes) == {"old", "new"}


def _write_and_wait(path: Path, started: Any) -> None:
    with atomic_file(path) as temporary:
        save_file({"a": torch.zeros(4)}, temporary)
        started.set()
        time.sleep(PATIENCE)


def test_a_temporary_is_removed_only_when_its_process_is_dead(tmp_path: Path, capfd) -> None:
    context = fork_server()
    started = context.Event()
    process = context.Process(target=_write_and_wait, args=(tmp_path / "x.safetensors", started))
    process.start()
    try:
        assert started.wait(PATIENCE)
        remove_stale(tmp_path)
        [temporary] = tmp_path.iterdir()
        assert is_temporary(temporary) and (temporary / "x.safetensors").is_file()
    finally:
        process.kill()
        process.join()
    with folder_lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    assert "removed 1 unfinished output of killed processes" in capfd.readouterr().err


def test_what_cannot_be_told_is_named_and_left(tmp_path: Path, capfd) -> None:
    (tmp_path / ".lapwan-tmp-12345678-x.mp4").touch()  # as older versions named theirs
    claim_output(tmp_path / "x.mp4", overwrite=False)
    assert f"{tmp_path}/.lapwan-tmp-12345678-x.mp4 was left by a killed process" in capfd.readouterr().err
    (tmp_path / ".lapwan-tmp-12345678").mkdir()  # killed before it was locked
    remove_stale(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lapwan-tmp-12345678-x.mp4"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_are_those_of_the_umask(umask: int, tmp_path: Path) -> None:
    model = tmp_path / "model.bin"
    model.touch(0o600)
    model.chmod(0o600)
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.zeros(4)}, temporary)  # makes its files 0600
        with folder_lock(tmp_path / "run"), atomic_folder(tmp_path / "run" / "step_1") as temporary:
            (temporary / "state").mkdir(0o700)
            save_file({"a": torch.zeros(4)}, temporary / "state" / "b.safetensors")
            os.link(model, temporary / "linked.bin")
    finally:
        os.umask(before)
    made = [path for path in tmp_path.rglob("*") if path.name not in ("model.bin", "linked.bin")]
    assert len(made) == 6
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path
    assert stat.S_IMODE(model.stat().st_mode) == 0o600  # somebody else's file
