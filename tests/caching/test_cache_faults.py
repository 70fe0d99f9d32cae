"""Kills, full disks, two processes at once: nothing lost, nothing wrong used."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cache_clips import cache_tiny, make_video, write_jsonl
from command_line import Started

from lapwan.caching.read import load_index, read_item
from lapwan.checkpoints.container import read_header
from lapwan.errors import UserError
from lapwan.files import is_temporary

CLIPS = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    for index in range(CLIPS):
        make_video(folder / f"c{index:02d}.mp4", frames=12, seed=index)
    return write_jsonl(folder / "clips.jsonl", [
        {"video_path": f"c{i:02d}.mp4", "caption": f"剪刀 {i}"} for i in range(CLIPS)])


@pytest.fixture(scope="module")
def reference(dataset, tmp_path_factory):
    """The cache of an undisturbed run."""
    return cache_tiny(dataset, tmp_path_factory.mktemp("reference") / "cache")


def command(dataset: Path, folder: Path, *more: str) -> list[str]:
    return ["cache", "--dataset", str(dataset), "--model", "tiny-t2v", "-o", str(folder), "--size", "32x48",
            "--num-frames", "9", "--device", "cpu", "--batch-size", "1", *more]


def whole(folder: Path) -> int:
    """How many cache files there are; each must be whole."""
    found = [path for path in folder.glob("*_wan.safetensors") if not is_temporary(path)]
    for path in found:
        read_header(path)
    return len(found)


def test_a_kill_in_the_middle_leaves_whole_files_and_the_next_run_goes_on(dataset, reference, tmp_path):
    folder = tmp_path / "cache"
    process = Started(*command(dataset, folder, "--workers", "1"))
    try:
        deadline = time.monotonic() + 60
        while len([path for path in folder.glob("*_wan.safetensors") if not is_temporary(path)]) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    count = whole(folder)
    assert 3 <= count < CLIPS
    with pytest.raises(UserError):
        load_index(folder)  # nothing is finished: no training on half a cache
    kept = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.safetensors") if not is_temporary(p)}
    cache_tiny(dataset, folder)
    assert all((folder / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())
    index = load_index(folder)
    assert len(index.items) == CLIPS
    for ours, theirs in zip(index.items, load_index(reference).items, strict=True):
        torch.testing.assert_close(read_item(folder, ours)["latents"], read_item(reference, theirs)["latents"],
                                   atol=1e-5, rtol=0)


def test_ctrl_c_says_how_to_go_on(dataset, tmp_path):
    folder = tmp_path / "cache"
    process = Started(*command(dataset, folder, "--workers", "1"))
    deadline = time.monotonic() + 60
    while not list(folder.glob("c*_wan.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    code, _, said = process.wait()
    assert code == 130
    assert "Traceback" not in said and said.strip().splitlines()[-1].startswith("interrupted; finished files")
    assert 1 <= whole(folder) < CLIPS


def test_a_kill_while_replacing_leaves_only_right_items_in_the_index(dataset, reference, tmp_path):
    """Half of the files are of the new size, beside all of the old ones."""
    folder = shutil.copytree(reference, tmp_path / "cache")
    process = Started(*command(dataset, folder, "--size", "48x48"))
    try:
        deadline = time.monotonic() + 60
        while len(list(folder.glob("c*_0048x0048_wan.safetensors"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with pytest.raises(UserError, match="no cached items"):
        load_index(folder)
    assert len(list(folder.glob("*_0048x0032_wan.safetensors"))) == CLIPS
    cache_tiny(dataset, folder, size=(48, 48))
    index = load_index(folder)
    assert {tuple(read_item(folder, item)["latents"].shape) for item in index.items} == {(16, 3, 6, 6)}
    assert whole(folder) == CLIPS


def test_kills_at_random_moments_cost_the_items_in_flight_only(dataset, reference, tmp_path):
    """What is finished at a kill is never made again, whenever it comes; no decoding process outlives the command."""
    folder, moments = tmp_path / "cache", random.Random(0)
    stamps: dict[str, int] = {}
    for finished in (2, 8, CLIPS + 3):  # files there before the kill; the last comes among the captions
        process = Started(*command(dataset, folder, "--workers", "2"))
        try:
            deadline = time.monotonic() + 60
            while len(list(folder.glob("c*.safetensors"))) < finished:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.1))
            workers = _children(process.pid)
            os.kill(process.pid, signal.SIGKILL)  # not the group: its decoders must end by themselves
            assert _end_soon(workers)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        now = {path.name: path.stat().st_mtime_ns for path in folder.glob("c*.safetensors")}
        assert {name: now.get(name) for name in stamps} == stamps, "a finished file was made again"
        assert len(now) >= finished
        stamps = now
    cache_tiny(dataset, folder)
    assert {name: (folder / name).stat().st_mtime_ns for name in stamps} == stamps
    assert [item.id for item in load_index(folder).items] == [item.id for item in load_index(reference).items]


def test_decoding_processes_that_are_killed_cost_nothing(dataset, tmp_path):
    folder, moments = tmp_path / "cache", random.Random(1)
    process = Started(*command(dataset, folder, "--workers", "2"))
    killed, deadline = 0, time.monotonic() + 100
    while process.poll() is None:
        assert time.monotonic() < deadline
        if killed < 2 and (workers := _children(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(moments.choice(workers), signal.SIGKILL)
                killed += 1
        time.sleep(moments.uniform(0.1, 1))
    code, _, err = process.wait()
    assert code == 0 and killed, err
    assert len(load_index(folder).items) == CLIPS and whole(folder) == CLIPS


def _end_soon(pids: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_two_processes_on_one_folder(dataset, tmp_path):
    folder = tmp_path / "cache"
    both = [ran.wait() for ran in [Started(*command(dataset, folder)) for _ in range(2)]]
    first, second = sorted(both, key=lambda ran: (ran.code, "nothing to do" in ran.out))
    assert first.code == 0 and "nothing to do" not in first.out, both
    # The second one is refused, unless it comes when the first one has ended.
    assert "is in use by process" in second.err if second.code else "nothing to do" in second.out, both
    assert len(load_index(folder).items) == CLIPS and whole(folder) == CLIPS


@pytest.fixture
def small_disk(tmp_path):
    """A 48 KiB tmpfs; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_what_is_there_is_whole(lapwan, dataset, tmp_path, small_disk):
    folder = small_disk / "cache"
    result = lapwan(*command(dataset, folder))
    assert result.code == 2
    assert result.err.strip().splitlines()[-1].startswith("error: cannot write to")
    assert "Traceback" not in result.err
    assert 1 <= whole(folder) < CLIPS
    assert not [p for p in folder.iterdir() if is_temporary(p)]
    # With room, the same folder goes on.
    roomy = tmp_path / "roomy"
    shutil.copytree(folder, roomy)
    cache_tiny(dataset, roomy)
    assert len(load_index(roomy).items) == CLIPS


def test_a_read_only_folder_is_one_line(lapwan, dataset, tmp_path):
    if os.geteuid() == 0:
        target = Path("/proc/lapwan-cache")  # where not even root may write
    else:
        target = tmp_path / "locked"
        target.mkdir(mode=0o500)
        target = target / "cache"
    result = lapwan(*command(dataset, target))
    assert result.code == 2 and "Traceback" not in result.err


def test_a_decoder_that_dies_takes_only_its_clip(dataset, tmp_path):
    """A worker killed from outside: its clip is tried again alone, and the rest goes on."""
    from lapwan.caching import decoder as decoding
    from lapwan.data.buckets import centre_crop
    from lapwan.data.video import probe

    jobs = []
    for index in range(4):
        path = dataset.parent / f"c{index:02d}.mp4"
        facts = probe(path, 16)
        crop = centre_crop(96, 64, (48, 32))
        jobs.append(decoding.DecodeJob(path, ((f"i{index}", range(9)),), crop, 16, facts, None))
    found = []
    with decoding.Decoder(jobs, workers=1) as items:
        for decoded in items:
            found.append(decoded)
            if len(found) == 1:
                for pid in _children(os.getpid()):
                    os.kill(pid, signal.SIGKILL)
    assert [d.id for d in found] == ["i0", "i1", "i2", "i3"]
    assert all(d.failure is None and d.frames.shape == (9, 32, 48, 3) for d in found)


def _children(parent: int) -> list[int]:
    """Decoding workers started by this process (not the resource tracker)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                line = (entry / "cmdline").read_text()
            except OSError:
                continue
            if int(stat[1]) == parent and "spawn_main" in line:
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_processes_of_a_launcher_share_the_work(dataset, reference, tmp_path):
    folder = tmp_path / "cache"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    result = subprocess.run([*launcher, "-m", "lapwan", *command(dataset, folder)], capture_output=True, text=True,
                            timeout=180)
    assert result.returncode == 0, result.stderr
    assert f"{CLIPS} items; {CLIPS} latents, {CLIPS} texts" in result.stdout
    assert result.stdout.count("items;") == 1
    index = load_index(folder)
    assert len(index.items) == CLIPS and index.prompts
    assert [item.id for item in index.items] == [item.id for item in load_index(reference).items]


def test_an_overflowing_vae_is_reported_and_nothing_of_it_written(dataset, tmp_path):
    from safetensors.torch import load_file, save_file

    from lapwan.tiny.model import tiny_folder

    model = tmp_path / "model"
    model.mkdir()
    for entry in tiny_folder("t2v").iterdir():
        if entry.name != "vae":
            (model / entry.name).symlink_to(entry)
    shutil.copytree(tiny_folder("t2v") / "vae", model / "vae")
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(weights).items()}
    tensors["quant_conv.bias"][3] = torch.inf
    save_file(tensors, weights)
    with pytest.raises(UserError, match=f"{CLIPS} of the clips could not be cached"):
        cache_tiny(dataset, tmp_path / "cache", model=str(model))
    assert not list((tmp_path / "cache").glob("*[0-9]_wan.safetensors"))
    with pytest.raises(UserError, match="no cached items"):
        load_index(tmp_path / "cache")
