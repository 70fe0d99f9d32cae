"""Prefetching decoded frames for the encoder: worker processes decode windows of clips into a bounded queue.

A job decodes a clip once for several of its windows. Workers import no torch. Decoding itself: `data/video.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from lapwan.caching.plan import PlannedItem
from lapwan.data.buckets import Crop
from lapwan.data.dropped_clips import BadClip
from lapwan.data.video import VideoFacts, read_frames
from lapwan.distributed import worker_pool

J = TypeVar("J")
R = TypeVar("R")

_FRAMES_PER_JOB = 256  # at most, in the union of its windows: bounds the memory of a job
_ATTEMPTS = 2  # of a job alone, before the fault is the job's
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
        largest = max((job.bytes for job in jobs), default=1)
        self._results = OrderedResults(jobs, run_job, _crashed, workers, _PREFETCH_BYTES // largest)

    def __enter__(self) -> Iterator[Decoded]:
        return (decoded for results in self._results.__enter__() for decoded in results)

    def __exit__(self, *_: object) -> None:
        self._results.__exit__()


def _crashed(job: DecodeJob) -> list[Decoded]:
    return [Decoded(name, None, "the decoder crashed on it", 0.0) for name, _ in job.windows]


class OrderedResults(Generic[J, R]):
    """`function(job)` of every job, in order, from worker processes: `with OrderedResults(...) as results`.

    A process that dies, by a fault of the decoder or killed from outside, costs nothing but its job's time: the job is
    run again in a process of its own, and the others go on. If that dies twice, too, `crashed(job)` is its result.

    Args:
        workers: processes; 0: each job is run in this process when its result is read.
        prefetch: jobs that are run before their results are read, at most; one per worker at least, two at most.
    """

    def __init__(
        self, jobs: Iterable[J], function: Callable[[J], R], crashed: Callable[[J], R], workers: int, prefetch: int
    ) -> None:
        self._remaining = deque(jobs)
        self._function, self._crashed = function, crashed
        self._workers = min(workers, len(self._remaining))
        self._prefetch = max(self._workers, min(2 * self._workers, prefetch))
        self._pending: deque[tuple[J, Future[R] | None]] = deque()  # None: not submitted
        self._pool = worker_pool(self._workers) if self._workers else None
        self._fill()

    def __enter__(self) -> Iterator[R]:
        return self._in_order()

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self) -> None:
        while self._pool is not None and self._remaining and len(self._pending) < self._prefetch:
            self._pending.append((self._remaining.popleft(), None))
        for number, (job, future) in enumerate(self._pending):
            if future is None:
                self._pending[number] = job, self._submitted(job)

    def _submitted(self, job: J) -> Future[R] | None:
        try:
            return None if self._pool is None else self._pool.submit(self._function, job)
        except BrokenProcessPool:  # a worker died since the last result was read: the next call of `_fill` submits it
            self._restart()
            return None

    def _in_order(self) -> Iterator[R]:
        while self._pool is None and self._remaining:
            yield self._function(self._remaining.popleft())
        while self._pending:
            job, future = self._pending.popleft()
            if future is None:
                result = self._isolated(job)
            else:
                try:
                    result = future.result()
                except BrokenProcessPool:
                    self._restart()
                    result = self._isolated(job)
            self._fill()
            yield result

    def _restart(self) -> None:
        """A new pool. Results that are there are kept; the other jobs are submitted again."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = worker_pool(self._workers)
        for number, (job, future) in enumerate(self._pending):
            if future is not None and (not future.done() or future.cancelled() or future.exception() is not None):
                self._pending[number] = job, None

    def _isolated(self, job: J) -> R:
        for _ in range(_ATTEMPTS):
            pool = worker_pool(1)
            try:
                return pool.submit(self._function, job).result()
            except BrokenProcessPool:
                continue
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return self._crashed(job)
