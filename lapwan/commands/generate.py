"""`lapwan generate`: prompts, and images for image-to-video, to video files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lapwan import console
from lapwan.api import Prepared, VideoGenerator
from lapwan.errors import Interrupted, UserError
from lapwan.files import atomic_file, claim_output
from lapwan.sampling.grid import make_grid
from lapwan.sampling.jobs import Job, check_options, make_jobs
from lapwan.sampling.repeat import compare, stored
from lapwan.sampling.result import Video
from lapwan.sampling.sheet import contact_sheet
from lapwan.sampling.video import check_video_path
from lapwan.settings.base import to_toml
from lapwan.settings.generate import GenerateSettings
from lapwan.settings.run import RunOptions

_SHEET_COLUMNS = 6


def run(settings: GenerateSettings, options: RunOptions) -> None:
    """Check every video against headers, then load, sample and write one after the other."""
    record = None
    if settings.from_video is not None:
        record, settings = stored(settings.from_video, settings)
    output = check_options(settings)
    jobs = make_jobs(settings)
    generator = VideoGenerator.from_settings(settings)
    prepared = [_prepare(generator, job) for job in jobs]
    sheet = _sheet_path(output, len(jobs)) if settings.sheet else None
    for job, made in zip(jobs, prepared, strict=True):
        claim_output(job.output, options.overwrite)
        check_video_path(job.output, made.request.num_frames, made.request.size)
    if sheet is not None:
        claim_output(sheet, options.overwrite)
    _show_plan(prepared)
    if options.dry_run:
        own = prepared[0].settings if len(jobs) == 1 else settings
        filled = settings.model_copy(update={name: getattr(own, name) for name in type(own).model_fields})
        console.results.print(to_toml(filled), markup=False)
        return
    videos = _make_all(generator, jobs, prepared, options)
    if sheet is not None:
        _write_sheet(sheet, jobs, videos)
    if record is not None:
        compare(record, videos[0])


def _prepare(generator: VideoGenerator, job: Job) -> Prepared:
    try:
        return generator.prepare(job.settings)
    except UserError as error:
        raise UserError(f"{job.place}: {error}" if job.place else str(error)) from None


def _show_plan(prepared: Sequence[Prepared]) -> None:
    for made in dict.fromkeys(_plan_line(made) for made in prepared):
        console.log(made)
    if len(prepared) > 1:
        console.log(f"{len(prepared)} videos")


def _plan_line(made: Prepared) -> str:
    request, spec = made.request, made.generator.spec
    grid = make_grid(spec, request.sampler, request.steps, request.flow_shift, request.start_sigma)
    height, width = request.size
    return f"{spec.task} at {height}x{width}, {request.num_frames} frames at {request.fps} fps; {grid}"


def _make_all(
    generator: VideoGenerator, jobs: Sequence[Job], prepared: Sequence[Prepared], options: RunOptions
) -> list[Video]:
    videos: list[Video] = []
    try:
        for job, made in zip(jobs, prepared, strict=True):
            if len(jobs) > 1:
                console.log(f"video {len(videos) + 1} of {len(jobs)}: {made.request.prompt}")
            video = generator.make(made)
            path = video.save(job.output, overwrite=options.overwrite)
            console.results.print(str(path), markup=False)
            videos.append(video)
    except KeyboardInterrupt:
        whole = ", ".join(str(job.output) for job in jobs[: len(videos)]) or "none"
        count = f"{len(videos)} of {len(jobs)} videos"
        raise Interrupted(f"interrupted after {count}; finished and whole: {whole}") from None
    return videos


def _sheet_path(output: Path, count: int) -> Path:
    if count > 1 and not output.suffix:
        return output / "sheet.png"
    return output.with_name(f"{output.stem}_sheet.png")


def _write_sheet(path: Path, jobs: Sequence[Job], videos: Sequence[Video]) -> None:
    captions = [job.caption or str(video.settings.get("prompt", "")) for job, video in zip(jobs, videos, strict=True)]
    smallest = min(video.frames.shape[2] for video in videos)
    image = contact_sheet([video.frames for video in videos], _SHEET_COLUMNS, captions, scale=max(1, 128 // smallest))
    with atomic_file(path) as temporary:
        image.save(temporary)
    console.results.print(str(path.absolute()), markup=False)
