"""The lock of an output folder: a second process on the same folder is refused, and --no-lock turns it off."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from forkserver import PATIENCE, fork_server

from lapwan.commands.table import COMMANDS
from lapwan.errors import UserError
from lapwan.files import LOCK_FILE, claim_output, folder_lock
from lapwan.tiny.dataset import write_dataset

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "cache": ("--dataset", "clips/clips.jsonl", "--model", "tiny", "--size", "32x32", "--num-frames", "5"),
    "train-lora": ("--steps", "1"), "train-moe": ("--steps", "1"),
    "srpo": ("--offline", "--steps", "1", "--reward", "tiny"), "evaluate": ("--model", "tiny"), "demo": (),
}
CACHED = ("train-lora", "train-moe", "srpo", "evaluate")


def _hold(folder: Path, held: Any) -> None:
    with folder_lock(folder):
        held.set()
        time.sleep(PATIENCE)


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[BaseProcess]:
    """Another process holds the folder's lock; it is killed at the end."""
    context = fork_server()
    held = context.Event()
    process = context.Process(target=_hold, args=(folder, held))
    process.start()
    try:
        assert held.wait(PATIENCE)
        yield process
    finally:
        process.kill()
        process.join()


def refusal(folder: Path, holder: BaseProcess) -> str:
    since = json.loads((folder / LOCK_FILE).read_text())["since"]
    return (f"{folder} is in use by process {holder.pid} on host {socket.gethostname()} since {since}; wait for that "
            "process, stop it, or choose another output")


@pytest.fixture
def arguments(t2v_cache: Path) -> Callable[[str], list[object]]:
    return lambda name: [name, *ARGUMENTS[name], *(("--cache", t2v_cache) if name in CACHED else ()), "-o", "out"]


def test_a_second_process_is_refused_by_host_and_pid_of_the_holder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held_elsewhere(folder) as process:
        held = json.loads((folder / LOCK_FILE).read_text())
        assert set(held) == {"host", "pid", "command", "since"}
        assert (held["host"], held["pid"]) == (socket.gethostname(), process.pid)
        assert abs(datetime.now(UTC) - datetime.fromisoformat(held["since"])) < timedelta(seconds=PATIENCE)
        for _ in range(2):  # a refused process leaves the holder's file as it was
            with pytest.raises(UserError) as refused, folder_lock(folder):
                pytest.fail("two processes hold the lock")
            assert str(refused.value) == refusal(folder, process)
        with folder_lock(folder, enabled=False):
            assert (folder / LOCK_FILE).exists()
        with folder_lock(tmp_path / "other"):
            pass
        process.kill()  # signal 9: it tidies nothing
        process.join()
        assert (folder / LOCK_FILE).exists()
        claim_output(folder, overwrite=False)  # a lock file alone is no output
        with folder_lock(folder):
            assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list(folder.iterdir()) == []  # the folder was there before, and stays


def test_the_lock_file_of_a_process_that_was_killed_on_another_host_locks_nothing(tmp_path: Path, capfd) -> None:
    (tmp_path / LOCK_FILE).write_text('{"host": "node7", "pid": 1, "command": "lapwan", "since": "2026-11-30"}\n')
    (tmp_path / "x").touch()
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert "process 1 on host node7 since 2026-11-30 has ended without finishing" in capfd.readouterr().err
    assert (tmp_path / LOCK_FILE).read_text() == ""  # one file, which stays


def test_a_lock_leaves_nothing_behind_where_nothing_was_written(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    with folder_lock(run):
        pass
    assert list(tmp_path.iterdir()) == []
    with folder_lock(run):
        (run / "x").touch()
    assert sorted(path.name for path in run.iterdir()) == [LOCK_FILE, "x"]
    with pytest.raises(UserError, match="x is a file, not a folder"), folder_lock(run / "x"):
        pytest.fail("a file was locked as a folder")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_in_the_file_system_it_refuses(number: int, tmp_path: Path, monkeypatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    refused = pytest.raises(UserError, match=f"cannot lock .*{os.strerror(number)}; .* pass --no-lock")
    with refused, folder_lock(tmp_path / "run"):
        pytest.fail("a lock where there are none")
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path / "run", enabled=False):
        assert list(tmp_path.iterdir()) == []


def test_every_command_that_locks_is_tested() -> None:
    assert {command.name for command in COMMANDS if command.locks} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_second_command_on_a_folder_is_refused(lapwan, arguments, tmp_path, name) -> None:
    if name == "cache":
        write_dataset(tmp_path / "clips", clips=1, seed=1, size=(32, 32), frames=5)
    with held_elsewhere(tmp_path / "out") as process:
        ran = lapwan(*arguments(name))
        assert ran.code == 2
        assert ran.err.strip().splitlines() == [f"error: {refusal(Path('out'), process)}"]
        assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_FILE]


def test_no_lock_writes_all_the_same(succeed, arguments, tmp_path) -> None:
    with held_elsewhere(tmp_path / "out"):
        succeed(*arguments("train-lora"), "--no-lock")
        assert (tmp_path / "out" / "lapwan_high_noise.safetensors").is_file()
        assert (tmp_path / "out" / LOCK_FILE).is_file()  # the holder's


def test_a_run_folder_keeps_the_lock_file_alone_and_a_dry_run_makes_none(succeed, arguments, tmp_path) -> None:
    succeed(*arguments("train-lora"), "--dry-run")
    assert list(tmp_path.iterdir()) == []
    succeed(*arguments("train-lora"))
    assert list(tmp_path.rglob(".*")) == [tmp_path / "out" / LOCK_FILE]
