"""Clips that are there twice: equal files, and clips that look the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import av
import numpy as np

from lapwan.caching.dataset_notes import dataset_notes, estimated_tokens
from lapwan.data.buckets import Buckets
from lapwan.data.clips import CacheSet, SourceClip
from lapwan.data.duplicates import look_alikes, same_files
from lapwan.data.frame_extraction import Extraction


def video(path: Path, seed: int, bit_rate: int, frames: int = 30) -> Path:
    """Drifting blobs of a seed."""
    scene = np.kron(np.random.default_rng(seed).integers(0, 255, (6, 12, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.bit_rate = 128, 96, bit_rate
        stream.pix_fmt = "yuv420p"
        for at in range(frames):
            frame = np.ascontiguousarray(scene[:, at:at + 128])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return path


def test_equal_files_and_look_alikes(tmp_path: Path) -> None:
    first = video(tmp_path / "a.mp4", 1, 800_000)
    shutil.copy(first, tmp_path / "copy.mp4")
    again = video(tmp_path / "again.mp4", 1, 300_000)  # other bytes
    other = video(tmp_path / "other.mp4", 2, 800_000)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"\0" * 100)
    clips = [first, tmp_path / "copy.mp4", again, other, broken, tmp_path / "none.mp4"]
    assert same_files([*clips, first]) == [[first, tmp_path / "copy.mp4"]]
    assert look_alikes(clips) == [[first, tmp_path / "copy.mp4", again]]


def test_black_clips_are_no_duplicates(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with av.open(str(tmp_path / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for _ in range(10):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")))
            container.mux(stream.encode())
    assert look_alikes([tmp_path / "a.mp4", tmp_path / "b.mp4"]) == []


def test_the_plan_says_what_is_there_twice_and_too_long(tmp_path: Path) -> None:
    first = video(tmp_path / "a.mp4", 1, 800_000)
    shutil.copy(first, tmp_path / "copy.mp4")
    clips = [SourceClip(first, "line 1", "hook"), SourceClip(first, "line 2", "hook"),
             SourceClip(tmp_path / "copy.mp4", "line 3", "the hook dissects " * 200)]
    cache = CacheSet(tmp_path / "c", tmp_path, Extraction(Buckets((96, 64), False, False, 16), (9,)), tuple(clips))
    notes = dataset_notes(cache, tmp_path / "no tokenizer", 512, near=False)
    assert "captions over 512 tokens, cut there: 1: line 3 (about (an estimate" in notes[0]
    assert notes[1:] == ("listed twice with the same caption: 1: a.mp4 (2 times)",
                         "the same file under several names: 1: a.mp4 = copy.mp4")
    assert estimated_tokens("抓钳" * 100) == 151
