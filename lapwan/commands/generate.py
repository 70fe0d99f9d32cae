"""`lapwan generate`: video files from prompts, and from images for image-to-video."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from lapwan import console
from lapwan.api import Prepared, VideoGenerator
from lapwan.commands.run_setup import distributed_run
from lapwan.console import PlanRow
from lapwan.errors import Interrupted, UserError
from lapwan.files import atomic_file, claim_output, is_temporary, was_written
from lapwan.report.contact_sheet import contact_sheet, side_by_side
from lapwan.report.page import write_page
from lapwan.sampling.jobs import UNNAMED, VideoJob, check_options, line_jobs, make_video_jobs, suffix_of
from lapwan.sampling.page import videos_page
from lapwan.sampling.request import grid_of
from lapwan.sampling.result import Video, check_output, compare_with_record, recorded_settings
from lapwan.sampling.video import write_video
from lapwan.settings.base import RunOptions, settings_row, to_toml
from lapwan.settings.generate import GenerateSettings
from lapwan.train.parallel import Distributed

_GRID_COLUMNS = 4
_SHOWN_KINDS = 4  # of videos that differ in size or steps, in the plan
_LEAST_WIDTH = 256  # pixels of a video on a sheet, so that a caption fits


def run(settings: GenerateSettings, options: RunOptions) -> None:
    """Check every video by the headers of the files, then load, sample and write them one after the other."""
    with distributed_run(settings.device) as (distributed, device):
        if not settings.interactive:
            _run(settings, options, distributed, device)
        elif distributed.count > 1:
            raise UserError(f"--interactive reads from one terminal, but {distributed.count} processes were started; "
                            "start one, or give the prompts as --prompts FILE")
        else:
            run_interactive(settings, options)


def _run(settings: GenerateSettings, options: RunOptions, distributed: Distributed, device: str) -> None:
    record = None
    if settings.from_video is not None:
        record, settings = recorded_settings(settings.from_video, settings)
    output = check_options(settings)
    jobs = make_video_jobs(settings)
    generator = VideoGenerator.from_settings(settings, device, distributed)
    prepared = [_prepare(generator, job) for job in jobs]
    sheet = _beside(output, len(jobs), "sheet", ".png") if settings.sheet or settings.grid else None
    together = _beside(output, len(jobs), "grid", ".mp4") if settings.grid else None
    for job, made in zip(jobs, prepared, strict=True):
        claim_output(job.output, options.overwrite)
        check_output(job.output, made.request.num_frames, made.request.size)
    for path in (sheet, together):
        if path is not None:
            claim_output(path, options.overwrite)
    page = _beside(output, len(jobs), "report", ".html") if settings.prompts is not None or settings.grid else None
    _show_plan(settings, prepared, distributed, page)
    if options.dry_run and not distributed.first:
        return
    if options.dry_run:
        video = prepared[0].settings if len(jobs) == 1 else settings
        filled = settings.model_copy(update={name: getattr(video, name) for name in type(video).model_fields})
        console.show_settings(to_toml(filled))
        return
    videos = _make_all(generator, jobs, prepared, settings, options, distributed)
    if not distributed.first:
        return
    if sheet is not None:
        _write_sheet(sheet, jobs, videos)
    if together is not None:
        _write_together(together, jobs, videos)
    if record is not None:
        compare_with_record(record, videos[0])
    if page is not None:
        _write_page(page, jobs, videos, settings, prepared[0])


def _prepare(generator: VideoGenerator, job: VideoJob) -> Prepared:
    try:
        return generator.prepare(job.settings, model=job.model)
    except UserError as error:
        raise (error.within(job.source) if job.source else error) from None


def _show_plan(
    settings: GenerateSettings, prepared: Sequence[Prepared], distributed: Distributed, page: Path | None
) -> None:
    first = prepared[0]
    rows = [PlanRow("model", f"{first.generator.spec.path} ({first.generator.spec.task})")]
    counts = Counter(map(_plan_text, prepared))
    for (video, steps), count in list(counts.items())[:_SHOWN_KINDS]:
        rows += [PlanRow("video" if count == 1 else f"{count} videos", video), PlanRow("sampling", steps)]
    if len(counts) > _SHOWN_KINDS:
        rows.append(PlanRow("", f"and {len(counts) - _SHOWN_KINDS} more sizes; {len(prepared)} videos in all"))
    if distributed.count > 1:
        rows.append(PlanRow("processes", f"{distributed.count} share the tokens of each video"))
    if settings.output is not None:
        rows.append(PlanRow("output", str(settings.output)))
    if page is not None:
        rows.append(PlanRow("page", f"{page}, for a browser: the videos in step"))
    console.show_plan([settings_row(settings), *rows])
    first.generator.begin(first.request)


def _plan_text(made: Prepared) -> tuple[str, str]:
    """(size and length, steps)."""
    request, spec = made.request, made.generator.spec
    grid = grid_of(spec, request)
    height, width = request.size
    length = "one frame" if request.num_frames == 1 else f"{request.num_frames} frames at {request.fps} fps"
    return f"{length}, {height}x{width}", str(grid).replace(": ", ":\n")


def _make_all(
    generator: VideoGenerator, jobs: Sequence[VideoJob], prepared: Sequence[Prepared], settings: GenerateSettings,
    options: RunOptions, distributed: Distributed,
) -> list[Video]:
    videos: list[Video] = []
    preview = None
    if settings.preview and settings.output is not None and distributed.first:
        preview = _beside(settings.output, len(jobs), "preview", ".png")
    try:
        for job, made in zip(jobs, prepared, strict=True):
            if len(jobs) > 1:
                console.log(f"video {len(videos) + 1} of {len(jobs)}: {made.request.prompt}")
            video = generator.make(made, preview)
            if distributed.first:
                path = video.save(job.output, overwrite=options.overwrite, crf=settings.crf)
                console.results.print(str(path), markup=False)
            videos.append(video)
    except KeyboardInterrupt:
        whole = [str(job.output) for job in jobs if was_written(job.output.expanduser())]
        raise Interrupted(f"interrupted after {len(whole)} of {len(jobs)} videos; complete: "
                          f"{', '.join(whole) or 'none'}", "--overwrite" if whole else "") from None
    return videos


def _beside(output: Path, count: int, name: str, suffix: str) -> Path:
    """`out_sheet.png` beside `out.mp4`; `DIR/sheet.png` in a folder of videos."""
    if count > 1 and not output.suffix:
        return output / f"{name}{suffix}"
    return output.with_name(f"{output.stem}_{name}{suffix}")


def _captions(jobs: Sequence[VideoJob]) -> list[str]:
    """The option values of a grid; else the prompts, after the file's name if there are several."""
    names = [f"{job.output.stem} " if len(jobs) > 1 else "" for job in jobs]
    return [job.caption or f"{name}{job.settings.prompt or ''}" for name, job in zip(names, jobs, strict=True)]


def _scale(videos: Sequence[Video]) -> int:
    """Factor by which small frames, such as the embedded model's, are enlarged."""
    smallest: int = min(video.frames.shape[2] for video in videos)
    return max(1, round(_LEAST_WIDTH / smallest))


def _write_together(path: Path, jobs: Sequence[VideoJob], videos: Sequence[Video]) -> None:
    columns = min(len(videos), _GRID_COLUMNS)
    frames = side_by_side([video.frames for video in videos], _captions(jobs), columns, _scale(videos))
    write_video(path, frames, videos[0].fps)
    console.results.print(str(path.absolute()), markup=False)


def _write_page(
    path: Path, jobs: Sequence[VideoJob], videos: Sequence[Video], settings: GenerateSettings, first: Prepared
) -> None:
    spec = first.generator.spec
    page = videos_page(jobs, videos, f"{spec.path} ({spec.task})", shlex.join(["lapwan", *sys.argv[1:]]),
                       to_toml(settings))
    if write_page(path, page):
        console.log(f"page: {path}")


def _write_sheet(path: Path, jobs: Sequence[VideoJob], videos: Sequence[Video]) -> None:
    frames = [video.frames for video in videos]
    image = contact_sheet(frames, captions=_captions(jobs), scale=_scale(videos))
    with atomic_file(path) as temporary:
        image.save(temporary)
    console.results.print(str(path.absolute()), markup=False)


_ASK = "prompt (or a JSON object with options; an empty line ends)> "


def run_interactive(settings: GenerateSettings, options: RunOptions) -> None:
    """Generate the videos of each line of stdin into the output folder; after a bad line it warns and reads the next.

    Raises:
        UserError: no output folder, or options that interactive mode does not have.
    """
    folder = settings.output
    if folder is None or folder.suffix:
        raise UserError("--interactive writes 001.mp4, 002.mp4, ... into a folder; give it as --output DIR")
    if settings.prompt is not None or settings.prompts is not None or settings.from_video is not None or settings.grid:
        raise UserError("--interactive reads its prompts from you; leave --prompt, --prompts, --from and --grid out")
    if settings.sheet:
        raise UserError("--sheet needs all videos of a run; leave it out with --interactive")
    generator = VideoGenerator.from_settings(settings)
    if options.dry_run:
        console.show_settings(to_toml(settings))
        return
    made: list[Path] = []
    try:
        for line in _lines():
            try:
                for job in line_jobs(settings, line, folder):
                    made.append(_make(generator, job, settings, options))
                    console.results.print(str(made[-1]), markup=False)
            except UserError as error:
                console.warn(f"skipped: {error}")
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; complete videos in {folder}: {len(made)}", again="") from None


def _make(generator: VideoGenerator, job: VideoJob, settings: GenerateSettings, options: RunOptions) -> Path:
    output = _next(job.output.parent, suffix_of(job.settings)) if job.output.name == UNNAMED else job.output
    prepared = generator.prepare(job.settings)
    claim_output(output, options.overwrite)
    check_output(output, prepared.request.num_frames, prepared.request.size)
    video = generator.make(prepared, job.output.parent / "preview.png" if settings.preview else None)
    return video.save(output, overwrite=options.overwrite, crf=settings.crf)


def _lines() -> Iterator[str]:
    asks = sys.stdin.isatty()
    while True:
        try:
            line = console.log_console.input(_ASK, markup=False) if asks else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        if line.strip():
            yield line.strip()
        elif asks:
            return


def _next(folder: Path, suffix: str) -> Path:
    files = [file for kind in ("*.mp4", "*.png") for file in folder.glob(kind) if not is_temporary(file)]
    taken = [int(file.stem) for file in files if file.stem.isdigit()]
    return folder / f"{max(taken, default=0) + 1:03d}{suffix}"
