"""From the settings of `generate` to a list of videos: a prompts file, several seeds, a comparison grid.

Order of videos: lines of the prompts file, then grid values, then seeds.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lapwan.documents import parse_json, read_text
from lapwan.errors import UserError, nearest
from lapwan.lora.formats import open_lora
from lapwan.settings.aliases import current_key, current_keys
from lapwan.settings.generate import GenerateSettings, LineSettings, ModelSettings, VideoSettings
from lapwan.settings.load import load
from lapwan.settings.lora_argument import ROLES, LoraArgument, Role

# What a grid may vary: options that keep the latents' shape and the images, so that all videos start from equal noise.
_ADAPTERS = ("lora", "moe")
GRID_OPTIONS = _ADAPTERS + tuple(
    name for name in VideoSettings.model_fields if name not in ("image", "last_image", "video", "size", "num_frames")
)

_STRENGTHS = {f"lora.{role}": role for role in ROLES}  # grid option -> whose LoRAs' strengths it sets
_PROMPTS_BYTES = 64 << 20
UNNAMED = "*"


@dataclass(frozen=True)
class VideoJob:
    """One video to generate.

    Args:
        model: the model with its adapters.
        caption: what distinguishes it from the other videos.
        column: the part of it that is neither prompt nor seed: what it is compared by at equal noise.
        source: where it was requested (a line of a prompts file), for error messages.
    """

    settings: VideoSettings
    model: ModelSettings
    output: Path
    caption: str = ""
    source: str = ""
    column: str = ""


def check_options(settings: GenerateSettings) -> Path:
    """Check that options are complete and do not contradict each other; returns the output path.

    Raises:
        UserError: no prompt, two sources of prompts, or no output.
    """
    if settings.output is None:
        raise UserError("--output is required: where to write, such as -o out.mp4")
    if settings.prompts is not None and settings.prompt is not None:
        raise UserError("--prompt and --prompts are both given; the file's lines have their own prompts: leave one out")
    if settings.prompts is None and settings.prompt is None:
        raise UserError("no prompt: give --prompt TEXT, --prompts FILE (JSON lines), or --from VIDEO")
    many = settings.prompts is not None or settings.videos > 1 or bool(settings.grid)
    if settings.crf is not None and settings.output.suffix != ".mp4" and (settings.output.suffix or not many):
        raise UserError(f"--crf is the quality of an .mp4; {settings.output} is not one; leave it out")
    if settings.grid and settings.prompts is not None:
        raise UserError("--grid compares one prompt; leave --prompts out")
    return settings.output


def make_video_jobs(settings: GenerateSettings) -> list[VideoJob]:
    """Every requested video.

    Raises:
        UserError: a bad line of the prompts file (with its number), a bad grid, or two videos with one output.
    """
    given = _given(settings)
    lines = [("", given, None)] if settings.prompts is None else list(_lines(settings.prompts, given))
    axes = _axes(settings)
    jobs: list[VideoJob] = []
    for source, tree, output in lines:
        for values in itertools.product(*(axis.values for axis in axes)):
            chosen = {axis.name: value for axis, value in zip(axes, values, strict=True)}
            caption = ", ".join(f"{axis.label}={value}" for axis, value in zip(axes, values, strict=True))
            column = ", ".join(f"{axis.label}={value}" for axis, value in zip(axes, values, strict=True)
                               if axis.name not in ("prompt", "seed"))
            model = _model(settings, chosen)
            video = {name: value for name, value in chosen.items() if name not in (*_ADAPTERS, *_STRENGTHS)}
            checked = _checked(VideoSettings, {**tree, **video}, source or "--grid")
            for extra in range(settings.videos):
                seeded = checked.model_copy(update={"seed": checked.seed + extra})
                note = f"seed={seeded.seed}" if settings.videos > 1 else ""
                label = ", ".join(filter(None, (caption, note)))
                jobs.append(VideoJob(seeded, model, output or Path(), label, source, column))
    return _with_outputs(settings, jobs)


def line_jobs(settings: GenerateSettings, line: str, folder: Path) -> list[VideoJob]:
    """The videos of a typed line: a prompt, or a JSON object as in a prompts file.

    If the line names no output, it is `UNNAMED`: the number is chosen when the video is written.

    Raises:
        UserError: broken JSON, or an option that is not understood.
    """
    options: Any = {"prompt": line}
    if line.startswith("{"):
        options = _line_object(line, "this line")
    checked = _checked(LineSettings, {**_given(settings), **options}, "this line")
    video = VideoSettings(**{name: getattr(checked, name) for name in checked.model_fields_set if name != "output"})
    path, jobs = folder / (checked.output or UNNAMED), []
    for extra in range(settings.videos):
        seeded = video.model_copy(update={"seed": video.seed + extra})
        several = settings.videos > 1 and checked.output is not None
        output = path.with_stem(f"{path.stem}_seed={seeded.seed}") if several else path
        jobs.append(VideoJob(seeded, settings, output))
    return jobs


def suffix_of(video: VideoSettings) -> str:
    """The file type of a video in a folder: a single frame is written as an image."""
    return ".png" if video.num_frames == 1 else ".mp4"


def _given(settings: GenerateSettings) -> dict[str, Any]:
    """The video options given on the command line or in TOML."""
    return {name: getattr(settings, name) for name in VideoSettings.model_fields if name in settings.model_fields_set}


def _line_object(line: str, source: str) -> dict[str, Any]:
    options = parse_json(line, source)
    if not isinstance(options, dict) or "prompt" not in options:
        raise UserError(f'{source}: expected an object with a prompt, such as {{"prompt": "...", "seed": 1}}')
    try:
        return current_keys(options)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def _model(settings: GenerateSettings, chosen: Mapping[str, str]) -> ModelSettings:
    """The model with the grid's adapters: `none`, or files (several LoRAs with commas between)."""
    options: dict[str, Any] = {name: getattr(settings, name) for name in ModelSettings.model_fields}
    if "lora" in chosen:
        options["lora"] = [] if chosen["lora"] == "none" else [part.strip() for part in chosen["lora"].split(",")]
    if "moe" in chosen:
        options["moe"] = None if chosen["moe"] == "none" else chosen["moe"]
    for name, role in _STRENGTHS.items():
        if name in chosen:
            loras = _checked(ModelSettings, {"lora": options["lora"]}, "--grid").lora
            options["lora"] = _with_strength(loras, role, float(chosen[name]))
    given = {name: value for name, value in options.items() if value is not None}
    checked: ModelSettings = _checked(ModelSettings, given, "--grid")
    return checked


def _with_strength(loras: Sequence[LoraArgument], role: Role, strength: float) -> list[LoraArgument]:
    """The LoRAs, those on the noise expert `role` with this strength; a LoRA for both becomes one for each.

    Raises:
        UserError: none of them is for that noise expert.
    """
    changed: list[LoraArgument] = []
    matches = False
    for lora in loras:
        if lora.noise_expert not in (None, "both"):
            roles: list[Role | None] = [lora.noise_expert]
        elif role == "both":
            roles = [lora.noise_expert]
        elif lora.noise_expert == "both":
            roles = ["high", "low"]
        else:  # None: not recorded, as in a model of one transformer
            roles = [None if e is None else e.value for e in open_lora(lora.path)]
        for own in roles:
            is_meant = role == "both" or own in (role, None)
            matches |= is_meant
            changed.append(lora.model_copy(update={
                "noise_expert": own, "strength": strength if is_meant else lora.strength}))
    if not matches:
        raise UserError(f"--grid lora.{role} varies the strength of the LoRAs on the {role} noise expert, but --lora "
                        "gives none for it" if loras else f"--grid lora.{role} needs a LoRA: give --lora FILE")
    return changed


def _checked(model: type[Any], tree: Mapping[str, Any], source: str) -> Any:
    try:
        return load(model, options=tree, environment={})
    except UserError as error:
        raise error.within(source) from None


def _lines(path: Path, given: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], Path | None]]:
    if not path.exists():
        raise UserError(f"no such file: {path}; --prompts needs JSON lines")
    text = read_text(path, _PROMPTS_BYTES)
    empty = True
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        empty, source = False, f"{path}, line {number}"
        options = _line_object(line, source)
        checked = _checked(LineSettings, {**given, **options}, source)
        tree = {name: getattr(checked, name) for name in checked.model_fields_set if name != "output"}
        yield source, tree, checked.output
    if empty:
        raise UserError(f"{path} contains no prompts; write one JSON object per line")


@dataclass(frozen=True)
class _GridAxis:
    """An option and its values; `label` is the name it was given under, which file names and captions show."""

    name: str
    label: str
    values: list[str]


def _axes(settings: GenerateSettings) -> list[_GridAxis]:
    axes = [_axis(text) for text in settings.grid]
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--grid varies '{name}' twice; give all its values at once: --grid {name}=A,B,...")
    if "seed" in names and settings.videos > 1:
        raise UserError("--grid seed=... and --videos both count seeds; leave one out")
    return axes


def _axis(text: str) -> _GridAxis:
    """Parse `alpha_expert=0,0.5,1`; `;` separates values that hold commas."""
    label, equals, rest = text.partition("=")
    label = label.strip().replace("-", "_")
    name = current_key(label)
    if not equals or not rest.strip():
        raise UserError(f"--grid {text}: expected OPTION=A,B,..., such as alpha_expert=0,0.5,1")
    allowed = (*GRID_OPTIONS, *_STRENGTHS)
    if name not in allowed:
        raise UserError(f"--grid {text}: '{name}' cannot be compared{nearest(name, allowed)}; "
                        f"allowed: {', '.join(allowed)}")
    separator = ";" if ";" in rest else ","
    values = [value.strip() for value in rest.split(separator)]
    if name == "lora" and all(_is_finite(value) for value in values):
        raise UserError(f"--grid {text} would compare files of these names; for strengths write lora.high={rest}, "
                        "lora.low or lora.both")
    if name in _STRENGTHS and not all(_is_finite(value) for value in values):
        raise UserError(f"--grid {text}: strengths must be numbers, such as {name}=0,0.5,1")
    return _GridAxis(name, label, values)


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _with_outputs(settings: GenerateSettings, jobs: list[VideoJob]) -> list[VideoJob]:
    """The jobs with their output paths; `output` holds the name that a line gives, or an empty path."""
    output = settings.output
    assert output is not None
    if len(jobs) == 1 and settings.prompts is None:
        return [replace(jobs[0], output=output)]
    digits = max(3, len(str(len(jobs))))
    folder = output.parent if output.suffix else output
    videos_per_line = Counter((job.source, job.output) for job in jobs)
    sources: dict[Path, str] = {}
    named: list[VideoJob] = []
    for number, job in enumerate(jobs, 1):
        label = "_".join(filter(None, (f"{number:0{digits}d}", re.sub(r"[^\w.=-]+", "_", job.caption))))
        if job.output != Path():
            path = folder / job.output
            if videos_per_line[job.source, job.output] > 1:
                path = path.with_name(f"{path.stem}_{label}{path.suffix}")
        else:
            unnamed = f"{label}{suffix_of(job.settings)}"
            path = folder / (f"{output.stem}_{label}{output.suffix}" if output.suffix else unnamed)
        if path in sources:
            raise UserError(f"{job.source}: output {path} is also that of {sources[path]}; give each its own")
        sources[path] = job.source
        named.append(replace(job, output=path))
    return named
