"""From the settings of `generate` to the videos to make: prompts of a file, seeds, a comparison grid.

Order of videos: lines of the prompts file, then grid values, then seeds.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lapwan.errors import UserError, nearest
from lapwan.settings.generate import GenerateSettings, LineSettings, ModelSettings, VideoSettings
from lapwan.settings.load import load

# What a grid may vary: what leaves shape and picture alone, so that the noise is the same.
_ADAPTERS = ("lora", "moe")
GRID_OPTIONS = _ADAPTERS + tuple(
    name for name in VideoSettings.model_fields if name not in ("image", "last_image", "video", "size", "num_frames")
)

UNNAMED = "*"


@dataclass(frozen=True)
class VideoJob:
    """One video: its settings, its model with adapters, where it goes, what tells it from its neighbours, and where it
    was said."""

    settings: VideoSettings
    model: ModelSettings
    output: Path
    caption: str = ""
    place: str = ""


def check_options(settings: GenerateSettings) -> Path:
    """Refuse what is missing or contradicts itself; the output's path.

    Raises:
        UserError: no prompt, two sources of prompts, or no output.
    """
    if settings.output is None:
        raise UserError("--output is required: where to write, such as -o out.mp4")
    if settings.prompts is not None and settings.prompt is not None:
        raise UserError("--prompt and --prompts are both given; the file's lines have their own prompts: leave one out")
    if settings.prompts is None and settings.prompt is None:
        raise UserError("nothing to make: give --prompt TEXT, --prompts FILE (JSON lines), or --from VIDEO")
    many = settings.prompts is not None or settings.videos > 1 or bool(settings.grid)
    if settings.crf is not None and settings.output.suffix != ".mp4" and (settings.output.suffix or not many):
        raise UserError(f"--crf is the quality of an .mp4; {settings.output} is none: leave it out")
    if settings.grid and settings.prompts is not None:
        raise UserError("--grid compares one prompt; leave --prompts out")
    return settings.output


def make_jobs(settings: GenerateSettings) -> list[VideoJob]:
    """Every video that is asked for.

    Raises:
        UserError: a bad line of the prompts file (with its number), a bad grid, or two videos with one output.
    """
    said = _said(settings)
    lines = [("", said, None)] if settings.prompts is None else list(_lines(settings.prompts, said))
    axes = _axes(settings)
    found: list[VideoJob] = []
    for place, tree, own in lines:
        for values in itertools.product(*(axis[1] for axis in axes)):
            chosen = dict(zip((axis[0] for axis in axes), values, strict=True))
            caption = ", ".join(f"{name}={value}" for name, value in chosen.items())
            model = _model(settings, chosen)
            video = {name: value for name, value in chosen.items() if name not in _ADAPTERS}
            checked = _checked(VideoSettings, {**tree, **video}, place or "--grid")
            for extra in range(settings.videos):
                seeded = checked.model_copy(update={"seed": checked.seed + extra})
                note = f"seed={seeded.seed}" if settings.videos > 1 else ""
                found.append(VideoJob(seeded, model, own or Path(), ", ".join(filter(None, (caption, note))), place))
    return _placed(settings, found)


def line_jobs(settings: GenerateSettings, line: str, folder: Path) -> list[VideoJob]:
    """The videos of a line that somebody typed: a prompt, or a JSON object as in a prompts file.

    One that the line does not name is called `UNNAMED`: its number is known when its turn comes.

    Raises:
        UserError: broken JSON, or an option that is not understood.
    """
    own: Any = {"prompt": line}
    if line.startswith("{"):
        own = _line_object(line, "this line")
    checked = _checked(LineSettings, {**_said(settings), **own}, "this line")
    video = VideoSettings(**{name: getattr(checked, name) for name in checked.model_fields_set if name != "output"})
    named, found = folder / (checked.output or UNNAMED), []
    for extra in range(settings.videos):
        seeded = video.model_copy(update={"seed": video.seed + extra})
        several = settings.videos > 1 and checked.output is not None
        output = named.with_stem(f"{named.stem}_seed={seeded.seed}") if several else named
        found.append(VideoJob(seeded, settings, output))
    return found


def suffix_of(video: VideoSettings) -> str:
    """Of a video in a folder of many: one frame is an image."""
    return ".png" if video.num_frames == 1 else ".mp4"


def _said(settings: GenerateSettings) -> dict[str, Any]:
    """The video options given on the command line or in TOML."""
    return {name: getattr(settings, name) for name in VideoSettings.model_fields if name in settings.model_fields_set}


def _line_object(line: str, place: str) -> dict[str, Any]:
    try:
        own = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(own, dict) or "prompt" not in own:
        raise UserError(f'{place}: expected an object with a prompt, such as {{"prompt": "...", "seed": 1}}')
    return own


def _model(settings: GenerateSettings, chosen: Mapping[str, str]) -> ModelSettings:
    """The model with the grid's adapters: `none`, or files (several LoRAs with commas between)."""
    own: dict[str, Any] = {name: getattr(settings, name) for name in ModelSettings.model_fields}
    if "lora" in chosen:
        own["lora"] = [] if chosen["lora"] == "none" else [part.strip() for part in chosen["lora"].split(",")]
    if "moe" in chosen:
        own["moe"] = None if chosen["moe"] == "none" else chosen["moe"]
    said = {name: value for name, value in own.items() if value is not None}
    checked: ModelSettings = _checked(ModelSettings, said, "--grid")
    return checked


def _checked(model: type[Any], tree: Mapping[str, Any], place: str) -> Any:
    try:
        return load(model, options=tree, environment={})
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _lines(path: Path, said: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], Path | None]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}; --prompts needs JSON lines") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    empty = True
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        empty, place = False, f"{path}, line {number}"
        own = _line_object(line, place)
        checked = _checked(LineSettings, {**said, **own}, place)
        tree = {name: getattr(checked, name) for name in checked.model_fields_set if name != "output"}
        yield place, tree, checked.output
    if empty:
        raise UserError(f"{path} holds no prompts; write one JSON object a line")


def _axes(settings: GenerateSettings) -> list[tuple[str, list[str]]]:
    axes = [_axis(text) for text in settings.grid]
    names = [name for name, _ in axes]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--grid varies '{name}' twice; give all its values at once: --grid {name}=A,B,...")
    if "seed" in names and settings.videos > 1:
        raise UserError("--grid seed=... and --videos both count seeds; leave one out")
    return axes


def _axis(text: str) -> tuple[str, list[str]]:
    """`alpha_expert=0,0.5,1` -> its name and values; `;` separates values that hold commas."""
    name, equals, rest = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not rest.strip():
        raise UserError(f"--grid {text}: expected OPTION=A,B,..., such as alpha_expert=0,0.5,1")
    if name not in GRID_OPTIONS:
        raise UserError(f"--grid {text}: '{name}' cannot be compared{nearest(name, GRID_OPTIONS)}; "
                        f"allowed: {', '.join(GRID_OPTIONS)}")
    separator = ";" if ";" in rest else ","
    return name, [value.strip() for value in rest.split(separator)]


def _placed(settings: GenerateSettings, found: list[VideoJob]) -> list[VideoJob]:
    """The jobs with their outputs; until now `output` held a line's own name, if it had one."""
    output = settings.output
    assert output is not None
    if len(found) == 1 and settings.prompts is None:
        return [replace(found[0], output=output)]
    digits = max(3, len(str(len(found))))
    folder = output.parent if output.suffix else output
    own = Counter((job.place, job.output) for job in found)
    owners: dict[Path, str] = {}
    jobs: list[VideoJob] = []
    for number, job in enumerate(found, 1):
        label = "_".join(filter(None, (f"{number:0{digits}d}", re.sub(r"[^\w.=-]+", "_", job.caption))))
        if job.output != Path():
            path = folder / job.output
            if own[job.place, job.output] > 1:
                path = path.with_name(f"{path.stem}_{label}{path.suffix}")
        else:
            unnamed = f"{label}{suffix_of(job.settings)}"
            path = folder / (f"{output.stem}_{label}{output.suffix}" if output.suffix else unnamed)
        if path in owners:
            raise UserError(f"{job.place}: output {path} is also that of {owners[path]}; give each its own")
        owners[path] = job.place
        jobs.append(replace(job, output=path))
    return jobs
