"""Decoding ahead of the encoder: windows of clips, read in worker processes, handed over in a bounded queue.

A job decodes one clip once for several of its windows. Workers import no torch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lapwan.data.buckets import Crop
from lapwan.data.plan import Wanted
from lapwan.data.video import BadClip, VideoFacts, read_frames

_FRAMES_PER_JOB = 256  # bounds what one job holds: frames of the union of its windows


@dataclass(frozen=True)
class Job:
    """Windows of one clip. Small and picklable: this is what crosses to a worker."""

    path: Path
    windows: tuple[tuple[str, range], ...]  # (item id, frames at the model's rate)
    crop: Crop
    fps: float
    facts: VideoFacts
    source_fps: float | None


@dataclass(frozen=True)
class Decoded:
    """An item's frames, uint8 [T, H, W, 3], or `failure`; `seconds` of decoding, shared out over the job's items."""

    id: str
    frames: np.ndarray | None
    failure: str | None
    seconds: float


def make_jobs(items: Sequence[Wanted], fps: float) -> list[Job]:
    """Group neighbouring windows of a clip so that its frames are decoded once."""
    jobs: list[Job] = []
    group: list[Wanted] = []

    def flush() -> None:
        if group:
            first = group[0]
            jobs.append(Job(first.clip.path, tuple((w.id, w.indices) for w in group), first.crop, fps, first.facts,
                            first.source_fps))
            group.clear()

    for wanted in items:
        if group and wanted.stem != group[0].stem:
            flush()
        together = {index for w in (*group, wanted) for index in w.indices}
        if group and len(together) > _FRAMES_PER_JOB:
            flush()
        group.append(wanted)
    flush()
    return jobs


def run_job(job: Job) -> list[Decoded]:
    """Decode a job's windows. A clip that cannot be decoded whole is tried window by window."""
    start = time.perf_counter()
    union = sorted({index for _, indices in job.windows for index in indices})
    try:
        frames = read_frames(job.path, union, job.crop, job.fps, job.facts, job.source_fps)
    except BadClip as error:
        if len(job.windows) == 1:
            return [Decoded(job.windows[0][0], None, str(error), time.perf_counter() - start)]
        alone = [Job(job.path, (window,), job.crop, job.fps, job.facts, job.source_fps) for window in job.windows]
        return [decoded for single in alone for decoded in run_job(single)]
    row = {index: position for position, index in enumerate(union)}
    seconds = (time.perf_counter() - start) / len(job.windows)
    return [
        Decoded(name, frames[row[indices[0]] : row[indices[-1]] + 1], None, seconds) for name, indices in job.windows
    ]


def decode(jobs: Sequence[Job], workers: int) -> Iterator[Decoded]:
    """The jobs' items in order; with `workers` processes up to two jobs a worker are under way ahead of the reader."""
    if workers == 0:
        for job in jobs:
            yield from run_job(job)
        return
    pool = _pool(workers)
    waiting: deque[tuple[Job, Future[list[Decoded]]]] = deque()
    left = deque(jobs)
    try:
        while left or waiting:
            while left and len(waiting) < 2 * workers:
                job = left.popleft()
                waiting.append((job, pool.submit(run_job, job)))
            job, future = waiting.popleft()
            try:
                yield from future.result()
            except BrokenProcessPool:
                # A decoder that crashes takes the pool with it: this job is tried alone, the others again.
                pool.shutdown(wait=False, cancel_futures=True)
                yield from _alone(job)
                left.extendleft(reversed([job for job, _ in waiting]))
                waiting.clear()
                pool = _pool(workers)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    # spawn: a fork of a process that holds CUDA or torch threads is not safe.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _alone(job: Job) -> list[Decoded]:
    with contextlib.closing(_Single()) as single:
        try:
            return single.pool.submit(run_job, job).result()
        except BrokenProcessPool:
            return [Decoded(name, None, "the decoder crashed on it", 0.0) for name, _ in job.windows]


class _Single:
    def __init__(self) -> None:
        self.pool = _pool(1)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
