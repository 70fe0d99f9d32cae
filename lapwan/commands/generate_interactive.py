"""`lapwan generate --interactive`: a prompt a line, the model stays loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from lapwan import console
from lapwan.api import VideoGenerator
from lapwan.errors import Interrupted, UserError
from lapwan.files import claim_output, is_temporary
from lapwan.sampling.jobs import UNNAMED, Job, line_jobs, suffix_of
from lapwan.sampling.result import check_output
from lapwan.settings.base import to_toml
from lapwan.settings.generate import GenerateSettings
from lapwan.settings.run import RunOptions

_ASK = "prompt (or a JSON object with options; an empty line ends)> "


def run_interactive(settings: GenerateSettings, options: RunOptions) -> None:
    """Make the videos of each line of stdin into the output folder; a bad line is answered and the next one read.

    Raises:
        UserError: no output folder, or options that belong to other ways of asking.
    """
    folder = settings.output
    if folder is None or folder.suffix:
        raise UserError("--interactive writes 001.mp4, 002.mp4, ... into a folder; give it as --output DIR")
    if settings.prompt is not None or settings.prompts is not None or settings.from_video is not None or settings.grid:
        raise UserError("--interactive reads its prompts from you; leave --prompt, --prompts, --from and --grid out")
    if settings.sheet:
        raise UserError("--sheet is made of videos that are known before; leave it out with --interactive")
    generator = VideoGenerator.from_settings(settings)
    if options.dry_run:
        console.results.print(to_toml(settings), markup=False)
        return
    made: list[Path] = []
    try:
        for line in _lines():
            try:
                for job in line_jobs(settings, line, folder):
                    made.append(_make(generator, job, settings, options))
                    console.results.print(str(made[-1]), markup=False)
            except UserError as error:
                console.warn(f"not made: {error}")
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; finished and whole in {folder}: {len(made)}") from None


def _make(generator: VideoGenerator, job: Job, settings: GenerateSettings, options: RunOptions) -> Path:
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
