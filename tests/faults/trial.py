"""Commands that are disturbed on purpose: a server that forks them, and what counts as the right end.

`python trial.py --serve` has imported lapwan once and forks a process for each request. Such a process is the leader of
a session, has limits and an environment of its own and ends as an interpreter does, after the program's `main`.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOCK_FILE, TEMPORARY = ".lapwan.lock", ".lapwan-tmp-"
CPU_SECONDS, RSS_MIB = 10.0, 1024.0  # of a refusal, imports included
_KILL_MIB = 6144  # so that a bomb does not take the machine with it
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_PRELOAD = ("lapwan.cli", "lapwan.api", "lapwan.commands.merge", "lapwan.commands.generate", "lapwan.commands.cache",
            "lapwan.commands.evaluate", "lapwan.commands.train_judge", "lapwan.commands.train_lora",
            "lapwan.commands.train_moe", "lapwan.commands.srpo", "lapwan.commands.label",
            "lapwan.commands.inspect_weights", "lapwan.commands.doctor", "lapwan.commands.demo",
            "lapwan.commands.split")


_QUIET_LIBRARIES = {  # as `cli.main` has them before it imports these, which the server has done already
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass
class Outcome:
    """A process that has ended.

    Args:
        code: exit code; minus a signal's number; None: killed by the server after its time or memory was used up.
        seconds, cpu: wall and processor time.
        orphans: command lines of processes that it left behind, which the server has killed.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    cpu: float
    rss_mib: float
    orphans: list[str] = field(default_factory=list)

    @property
    def last(self) -> str:
        """The last line of stderr."""
        lines = self.err.rstrip("\n").split("\n")
        return lines[-1]


class Running:
    """A process of the server that has been started."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.started, self.ended = threading.Event(), threading.Event()
        self.pid = 0
        self.reply: dict[str, Any] = {}

    def signal(self, number: int, group: bool = True) -> None:
        """To its process group, or to it alone; nothing if it has ended."""
        self.started.wait()
        if not self.ended.is_set():
            try:
                (os.killpg if group else os.kill)(self.pid, number)
            except ProcessLookupError:
                return

    def wait(self) -> Outcome:
        """Wait for the end."""
        self.ended.wait()
        out, err = (Path(self.request[key]) for key in ("out", "err"))
        texts = [path.read_text("utf-8", "replace") if path.exists() else "" for path in (out, err)]
        out.unlink(missing_ok=True)
        err.unlink(missing_ok=True)
        return Outcome(out=texts[0], err=texts[1], **self.reply)


class Server:
    """Forks commands; safe to use from several threads."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="lapwan-trials-")
        child_environment = {**_environment(), **(environment or {})}
        self._process = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, env=child_environment, text=True)
        self._running: dict[int, Running] = {}
        self._lock = threading.Lock()
        self._count = 0
        self.stopped = False  # True: nothing more is started
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            message = json.loads(line)
            running = self._running[message.pop("id")]
            if "pid" in message:
                running.pid = message["pid"]
                running.started.set()
            else:
                running.reply = message
                running.ended.set()
                del self._running[running.request["id"]]
        for running in list(self._running.values()):  # the server has ended: nobody need wait for it
            running.reply = running.reply or {"code": None, "seconds": 0.0, "cpu": 0.0, "rss_mib": 0.0}
            running.started.set()
            running.ended.set()

    def start(self, arguments: Sequence[object], cwd: Path, timeout: float = 120.0,
              environment: Mapping[str, str] | None = None, limits: Mapping[str, int] | None = None) -> Running:
        """Start `lapwan ARGUMENTS` in `cwd`; `limits` are names of `resource` such as RLIMIT_FSIZE."""
        with self._lock:
            if self.stopped:
                raise RuntimeError("the trials have been stopped")
            self._count += 1
            number = self._count
            stem = Path(self.folder.name) / str(number)
            running = Running({
                "id": number, "arguments": [str(a) for a in arguments], "cwd": str(cwd), "timeout": timeout,
                "environment": dict(environment or {}), "limits": dict(limits or {}), "out": f"{stem}.out",
                "err": f"{stem}.err"})
            self._running[number] = running
            assert self._process.stdin
            self._process.stdin.write(json.dumps(running.request) + "\n")
            self._process.stdin.flush()
        running.started.wait()
        return running

    def run(self, arguments: Sequence[object], cwd: Path, **how: Any) -> Outcome:
        """Run a command to its end."""
        return self.start(arguments, cwd, **how).wait()

    def stop(self) -> None:
        """Kill what runs and start nothing more."""
        self.stopped = True
        for running in list(self._running.values()):
            if running.started.is_set():
                running.signal(signal.SIGKILL)

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self.folder.cleanup()


def _environment() -> dict[str, str]:
    """With the lapwan of PYTHONPATH, or of this tree; on the CPU, where results are the same bytes each time."""
    return {"PYTHONPATH": str(ROOT), **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", **_QUIET_LIBRARIES}


def run_program(arguments: Sequence[object], cwd: Path, timeout: float = 120.0) -> Outcome:
    """`python -m lapwan ARGUMENTS` as a program of its own, without the server."""
    start, peak = time.monotonic(), 0.0
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen([sys.executable, "-m", "lapwan", *map(str, arguments)], cwd=cwd, stdout=out,
                                   stderr=err, env=_environment(), stdin=subprocess.DEVNULL)
        killed = False
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            peak = max(peak, _peak_mib(process.pid))
            if not killed and (peak > _KILL_MIB or time.monotonic() - start > timeout):
                killed = True
                process.kill()
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return Outcome(None if killed else process.returncode, texts[0], texts[1], time.monotonic() - start,
                   usage.ru_utime + usage.ru_stime, peak)


def _peak_mib(pid: int) -> float:
    """The largest resident size so far; what wait4 tells includes that of the program which started it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


# ---- the server's side


def _serve() -> None:
    import importlib

    import torch

    torch.set_num_threads(1)
    for name in _PRELOAD:
        importlib.import_module(name)
    from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: F401  imported on first use otherwise
    from transformers import AutoTokenizer, UMT5EncoderModel  # noqa: F401

    gc.collect()
    gc.freeze()  # a child's collections need not touch, and so copy, what was imported
    replies = os.dup(1)
    requests = sys.stdin.buffer
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors need no waiting for
    while line := requests.readline():
        request = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if _supervise(request, replies):
                return  # the command's process: __main__ runs it
            os._exit(0)


def _supervise(request: dict[str, Any], replies: int) -> bool:
    """Fork the command and reply when it has ended; True in the command's process."""
    def reply(**message: Any) -> None:
        os.write(replies, (json.dumps({"id": request["id"], **message}) + "\n").encode())

    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(replies)
        _become(request)
        return True
    while _session_of(pid) != pid and _alive(pid):
        time.sleep(0.0005)
    reply(pid=pid)
    killed = False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if not killed and (time.monotonic() - start > request["timeout"] or _rss_mib(pid) > _KILL_MIB):
            killed = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.005)
    seconds = time.monotonic() - start
    orphans = _left_behind(pid)
    code = None if killed else os.waitstatus_to_exitcode(status)
    reply(code=code, seconds=seconds, cpu=usage.ru_utime + usage.ru_stime, rss_mib=usage.ru_maxrss / 1024,
          orphans=[text[:200] for text in orphans])
    return False


def _become(request: dict[str, Any]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for number, key in ((1, "out"), (2, "err")):
        descriptor = os.open(request[key], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", buffering=1) for n in (1, 2))
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    for name, value in request["limits"].items():
        if name == "RLIMIT_FSIZE":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does: the write fails with EFBIG
        resource.setrlimit(getattr(resource, name), (value, value))
    sys.argv = ["lapwan", *request["arguments"]]


def _stat(pid: int | str) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []


def _session_of(pid: int) -> int:
    parts = _stat(pid)
    return int(parts[3]) if parts else -1


def _alive(pid: int) -> bool:
    parts = _stat(pid)
    return bool(parts) and parts[0] not in "ZX"


def _rss_mib(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except (OSError, IndexError):
        return 0.0


def session_members(session: int) -> list[int]:
    """Processes of a session that still run."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()
            and (parts := _stat(entry.name)) and int(parts[3]) == session and parts[0] not in "ZX"]


def _left_behind(session: int, patience: float = 3.0) -> list[str]:
    deadline = time.monotonic() + patience
    while (members := session_members(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    lines = []
    for pid in members:
        try:
            lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
            os.kill(pid, signal.SIGKILL)
        except OSError:
            continue
    return lines


# ---- what is right


Tree = dict[str, tuple[object, ...]]


def tree(folder: Path) -> Tree:
    """What lies below a folder, by relative path; links are not followed. Lock files are left out."""
    entries: Tree = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            if name == LOCK_FILE:
                continue
            path = os.path.join(parent, name)  # noqa: PTH118  names may be anything
            info = os.lstat(path)
            is_folder = name in folders and not os.path.islink(path)  # noqa: PTH114
            entries[os.path.relpath(path, folder)] = (
                ("folder",) if is_folder else ("file", info.st_size, info.st_mtime_ns, info.st_ino))
    return entries


def temporaries(entries: Tree) -> list[str]:
    """Hidden files, which nobody asked for."""
    return [path for path in entries if os.path.basename(path).startswith(".")]  # noqa: PTH119


def changes(before: Tree, after: Tree, may_write: Callable[[str], bool]) -> list[str]:
    """What was changed, removed, left as a temporary, or made where nothing may be written."""
    wrong = [f"changed {path!r}" for path, entry in before.items() if path in after and after[path] != entry
             and not may_write(path)]
    wrong += [f"removed {path!r}" for path in before if path not in after and not may_write(path)]
    new = [path for path in after if path not in before]
    hidden = set(temporaries(dict.fromkeys(new, ())))
    wrong += [f"left {path!r}" for path in hidden]
    wrong += [f"made {path!r}" for path in new if path not in hidden and not may_write(path)]
    return wrong


def refusal_faults(outcome: Outcome, may_pass: bool = False) -> list[str]:
    """What is wrong with the end of a command on bad input: it should be exit code 2 and one line.

    Args:
        may_pass: success counts as right, too: the damage may be where nothing is read.
    """
    if outcome.code is None:
        return [f"did not end: {outcome.seconds:.0f} s, {outcome.rss_mib:.0f} MiB"]
    wrong = []
    if "Traceback (most recent call last)" in outcome.err:
        lines = [line for line in outcome.err.split("\n") if line and not line[0].isspace()]
        wrong.append(f"traceback: {lines[-1][:160]}" if lines else "traceback")
    elif outcome.code not in ((0, 2) if may_pass else (2,)):
        wrong.append(f"exit code {outcome.code}: {outcome.last[:160]!r}")
    if outcome.code == 2:
        lines = outcome.err.rstrip("\n").split("\n")
        errors = [index for index, line in enumerate(lines) if line.startswith("error: ")]
        # Several keys of one settings file are listed below the line, indented.
        if len(errors) != 1 or not all(line.startswith("  ") for line in lines[errors[0] + 1 :]):
            wrong.append(f"{len(errors)} error lines, the last line is {outcome.last[:160]!r}")
        elif (longest := max(map(len, lines))) > 2000:
            wrong.append(f"a line of {longest} characters")
    if _CONTROL.search(outcome.err):
        wrong.append("control characters on stderr")
    if outcome.cpu > CPU_SECONDS and outcome.code != 0:  # of the whole work, which may take longer
        wrong.append(f"{outcome.cpu:.0f} s of CPU")
    if outcome.rss_mib > RSS_MIB:
        wrong.append(f"{outcome.rss_mib:.0f} MiB")
    if outcome.orphans:
        wrong.append(f"left processes: {outcome.orphans}")
    return wrong


if __name__ == "__main__" and "--serve" in sys.argv:
    _serve()
    if sys.argv[0] == "lapwan":
        from lapwan.__main__ import main

        main()
