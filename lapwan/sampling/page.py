"""The page of many generated videos: a row for each prompt and seed, that is for each noise; a grid's values beside
each other."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lapwan.console import count_text
from lapwan.report.page import Bilingual, Overlay, Page, VideoCell, VideoGrid, VideoRow
from lapwan.sampling.jobs import VideoJob
from lapwan.sampling.result import Video
from lapwan.sampling.video import FINE_CRF, SUFFIXES, write_video


def videos_page(jobs: Sequence[VideoJob], videos: Sequence[Video], model: str, command: str, settings: str) -> Page:
    """The page of finished videos.

    Args:
        jobs: what was asked for; their files are written.
        videos: one for each job.
        model: as the plan names it.
        command: what repeats them.
        settings: as TOML.
    """
    rows: dict[tuple[str, str, int], list[tuple[VideoJob, Video]]] = {}
    for job, video in zip(jobs, videos, strict=True):
        rows.setdefault((job.source, job.settings.prompt or "", job.settings.seed), []).append((job, video))
    longest = max(videos, key=lambda video: len(video.frames) / video.fps)
    grid = VideoGrid(
        Bilingual("Videos", "视频"), tuple(_row(prompt, seed, made) for (_, prompt, seed), made in rows.items()),
        len(longest.frames), longest.fps, longest.frames.shape[1:3],
        Bilingual("A row has the same prompt and noise.", "同一行使用相同的提示词和噪声。"))
    facts = ((Bilingual("model", "模型"), model), (Bilingual("videos", "视频"), count_text(len(videos), "video")))
    return Page("generate", Bilingual("Generated videos", "生成的视频"), facts, (grid,), command, settings)


def _row(prompt: str, seed: int, made: Sequence[tuple[VideoJob, Video]]) -> VideoRow:
    cells = tuple(_cell(job, video) for job, video in made)
    mixes = [dict(cell.overlay.mix) for cell in cells if cell.overlay.mix]
    family = max(mixes[0], key=mixes[0].__getitem__) if mixes else ""
    return VideoRow(prompt, cells, family=family, note=f"seed {seed}")


def _cell(job: VideoJob, video: Video) -> VideoCell:
    routed = video.facts.get("moe")
    overlay = Overlay()
    if isinstance(routed, Mapping):
        overlay = Overlay(mix=tuple(routed["mix"].items()), source=routed["by"])
    title = job.column or job.output.name
    if job.output.suffix.lower() in SUFFIXES:
        return VideoCell(title, job.output, overlay=overlay)
    height, width = video.frames.shape[1:3]
    if height % 2 or width % 2:
        return VideoCell(title, overlay=overlay, note=job.output.name)
    return VideoCell(title, data=_mp4(video), overlay=overlay)


def _mp4(video: Video) -> bytes:
    """The video as a browser plays it: of latents or frames that were written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, video.frames, video.fps, crf=FINE_CRF)
        return path.read_bytes()
