"""Decoding ahead of the encoder: windows of clips, read in worker processes, handed over in a bounded queue.

A job decodes one clip once for several of its windows. Workers import no torch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lapwan.caching.plan import Wanted
from lapwan.data.buckets import Crop
from lapwan.data.video import BadClip, VideoFacts, read_frames
from lapwan.distributed import worker_pool

_FRAMES_PER_JOB = 256  # bounds what one job holds: frames of the union of its windows
_BYTES_AHEAD = 2 * 2**30  # decoded frames that may wait for the encoder


@dataclass(frozen=True)
class DecodeJob:
    """Windows of one clip. Small and picklable: this is what crosses to a worker."""

    path: Path
    windows: tuple[tuple[str, range], ...]  # (item id, frames at the model's rate)
    crop: Crop
    fps: float
    facts: VideoFacts
    source_fps: float | None

    @property
    def bytes(self) -> int:
        """What its frames take once decoded."""
        return len({i for _, indices in self.windows for i in indices}) * self.crop.bucket[0] * self.crop.bucket[1] * 3


@dataclass(frozen=True)
class Decoded:
    """An item's frames, uint8 [T, H, W, 3], or `failure`; `seconds` of decoding, shared out over the job's items."""

    id: str
    frames: np.ndarray | None
    failure: str | None
    seconds: float


def make_jobs(items: Sequence[Wanted], fps: float) -> list[DecodeJob]:
    """Group neighbouring windows of a clip so that its frames are decoded once."""
    jobs: list[DecodeJob] = []
    group: list[Wanted] = []

    def flush() -> None:
        if group:
            first = group[0]
            jobs.append(DecodeJob(first.clip.path, tuple((w.id, w.indices) for w in group), first.crop, fps, first.facts,
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


def run_job(job: DecodeJob) -> list[Decoded]:
    """Decode a job's windows. A clip that cannot be decoded whole is tried window by window."""
    start = time.perf_counter()
    union = sorted({index for _, indices in job.windows for index in indices})
    try:
        frames = read_frames(job.path, union, job.crop, job.fps, job.facts, job.source_fps)
    except BadClip as error:
        if len(job.windows) == 1:
            return [Decoded(job.windows[0][0], None, str(error), time.perf_counter() - start)]
        alone = [DecodeJob(job.path, (window,), job.crop, job.fps, job.facts, job.source_fps) for window in job.windows]
        return [decoded for single in alone for decoded in run_job(single)]
    row = {index: position for position, index in enumerate(union)}
    seconds = (time.perf_counter() - start) / len(job.windows)
    return [
        Decoded(name, frames[row[indices[0]] : row[indices[-1]] + 1], None, seconds) for name, indices in job.windows
    ]


class Decoder:
    """The jobs' items, in order: `with Decoder(jobs, workers) as items: for decoded in items`.

    With `workers` processes the work begins at once, up to two jobs a worker ahead of the reader as far as memory
    allows; 0 decodes in this process, as it is read.
    """

    def __init__(self, jobs: Sequence[DecodeJob], workers: int) -> None:
        self._left = deque(jobs)
        self._workers = min(workers, len(jobs))
        self._waiting: deque[tuple[DecodeJob, Future[list[Decoded]]]] = deque()
        self._pool = worker_pool(self._workers) if self._workers else None
        largest = max((job.bytes for job in jobs), default=1)
        self._ahead = max(self._workers, min(2 * self._workers, _BYTES_AHEAD // largest))
        self._fill()

    def __enter__(self) -> Iterator[Decoded]:
        return self._items()

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self) -> None:
        while self._pool is not None and self._left and len(self._waiting) < self._ahead:
            job = self._left.popleft()
            self._waiting.append((job, self._pool.submit(run_job, job)))

    def _items(self) -> Iterator[Decoded]:
        while self._pool is None and self._left:
            yield from run_job(self._left.popleft())
        while self._waiting:
            job, future = self._waiting.popleft()
            try:
                decoded = future.result()
            except BrokenProcessPool:
                decoded = self._recover(job)
            self._fill()
            yield from decoded

    def _recover(self, job: DecodeJob) -> list[Decoded]:
        """A decoder that crashes takes the pool with it: this job is tried alone, the others again."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._left.extendleft(reversed([other for other, _ in self._waiting]))
        self._waiting.clear()
        decoded = _alone(job)
        self._pool = worker_pool(self._workers)
        return decoded


def _alone(job: DecodeJob) -> list[Decoded]:
    pool = worker_pool(1)
    try:
        return pool.submit(run_job, job).result()
    except BrokenProcessPool:
        return [Decoded(name, None, "the decoder crashed on it", 0.0) for name, _ in job.windows]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
