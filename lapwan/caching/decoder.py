"""Prefetching decoded frames for the encoder: worker processes decode windows of clips into a bounded queue.

A job decodes a clip once for several of its windows. Workers import no torch. Decoding itself: `data/video.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lapwan.caching.plan import PlannedItem
from lapwan.data.buckets import Crop
from lapwan.data.dropped_clips import BadClip
from lapwan.data.video import VideoFacts, read_frames
from lapwan.distributed import worker_pool

_FRAMES_PER_JOB = 256  # at most, in the union of its windows: bounds the memory of a job
_PREFETCH_BYTES = 2 * 2**30  # decoded frames that may wait for the encoder


@dataclass(frozen=True)
class DecodeJob:
    """Windows of a clip to decode. Small and picklable, to be sent to a worker."""

    path: Path
    windows: tuple[tuple[str, range], ...]  # (item id, frames at the model's rate)
    crop: Crop
    fps: float
    facts: VideoFacts
    source_fps: float | None

    @property
    def bytes(self) -> int:
        """Bytes of its decoded frames."""
        return len({i for _, indices in self.windows for i in indices}) * self.crop.bucket[0] * self.crop.bucket[1] * 3


@dataclass(frozen=True)
class Decoded:
    """An item's frames, uint8 [T, H, W, 3], or `failure`; `seconds` is its share of the job's decoding time."""

    id: str
    frames: np.ndarray | None
    failure: str | None
    seconds: float


def make_jobs(items: Sequence[PlannedItem], fps: float) -> list[DecodeJob]:
    """Group neighbouring windows of a clip so that its frames are decoded once."""
    jobs: list[DecodeJob] = []
    group: list[PlannedItem] = []

    def flush() -> None:
        if group:
            first = group[0]
            windows = tuple((item.id, item.indices) for item in group)
            jobs.append(DecodeJob(first.clip.path, windows, first.crop, fps, first.facts, first.source_fps))
            group.clear()

    for item in items:
        if group and item.stem != group[0].stem:
            flush()
        union = {index for other in (*group, item) for index in other.indices}
        if group and len(union) > _FRAMES_PER_JOB:
            flush()
        group.append(item)
    flush()
    return jobs


def run_job(job: DecodeJob) -> list[Decoded]:
    """Decode a job's windows; if that fails, window by window."""
    start = time.perf_counter()
    union = sorted({index for _, indices in job.windows for index in indices})
    try:
        frames = read_frames(job.path, union, job.crop, job.fps, job.facts, job.source_fps)
    except BadClip as error:
        if len(job.windows) == 1:
            return [Decoded(job.windows[0][0], None, str(error), time.perf_counter() - start)]
        singles = [replace(job, windows=(window,)) for window in job.windows]
        return [decoded for single in singles for decoded in run_job(single)]
    row = {index: position for position, index in enumerate(union)}
    seconds = (time.perf_counter() - start) / len(job.windows)
    return [
        Decoded(name, frames[row[indices[0]] : row[indices[-1]] + 1], None, seconds) for name, indices in job.windows
    ]


class Decoder:
    """The jobs' items, in order: `with Decoder(jobs, workers) as items: for decoded in items`.

    With `workers` processes, decoding begins at once and prefetches up to two jobs per worker as far as memory allows;
    with 0, each job is decoded in this process when it is read.
    """

    def __init__(self, jobs: Sequence[DecodeJob], workers: int) -> None:
        self._remaining = deque(jobs)
        self._workers = min(workers, len(jobs))
        self._pending: deque[tuple[DecodeJob, Future[list[Decoded]]]] = deque()
        self._pool = worker_pool(self._workers) if self._workers else None
        largest = max((job.bytes for job in jobs), default=1)
        self._prefetch = max(self._workers, min(2 * self._workers, _PREFETCH_BYTES // largest))
        self._fill()

    def __enter__(self) -> Iterator[Decoded]:
        return self._items()

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self) -> None:
        while self._pool is not None and self._remaining and len(self._pending) < self._prefetch:
            job = self._remaining.popleft()
            self._pending.append((job, self._pool.submit(run_job, job)))

    def _items(self) -> Iterator[Decoded]:
        while self._pool is None and self._remaining:
            yield from run_job(self._remaining.popleft())
        while self._pending:
            job, future = self._pending.popleft()
            try:
                decoded = future.result()
            except BrokenProcessPool:
                decoded = self._recover(job)
            self._fill()
            yield from decoded

    def _recover(self, job: DecodeJob) -> list[Decoded]:
        """A decoder that crashes breaks the pool: run this job in a separate pool, and submit the others again."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._remaining.extendleft(reversed([other for other, _ in self._pending]))
        self._pending.clear()
        decoded = _run_isolated(job)
        self._pool = worker_pool(self._workers)
        return decoded


def _run_isolated(job: DecodeJob) -> list[Decoded]:
    pool = worker_pool(1)
    try:
        return pool.submit(run_job, job).result()
    except BrokenProcessPool:
        return [Decoded(name, None, "the decoder crashed on it", 0.0) for name, _ in job.windows]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
