"""`lapwan demo`: the whole pipeline on the embedded model, each stage as the command a user would type."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich import box
from rich.table import Table

from lapwan import console, files
from lapwan.commands.table import COMMANDS
from lapwan.data.clips import read_clips, resolve_video
from lapwan.names import NoiseExpert
from lapwan.sampling.image import read_clip
from lapwan.sampling.sheet import contact_sheet
from lapwan.settings.base import flag_fields, to_toml
from lapwan.settings.demo import DemoSettings
from lapwan.settings.load import load
from lapwan.settings.run import RunOptions
from lapwan.tiny.dataset import write_dataset
from lapwan.tiny.model import tiny_folder
from lapwan.train.metrics import METRICS_FILE
from lapwan.wan.folder import read_spec

_LR = "1e-3"  # a small model takes a larger step than the default for the 14B one
_PROMPTS = {
    "scissors": "剪刀剪断血管", "hook": "电凝钩切割组织", "suction": "吸引清理术野",
    "grasper": "The grasper lifts the tissue",
}


@dataclass
class _Diary:
    """What the closing table says: stage, where its result is, figures, seconds."""

    rows: list[tuple[str, str, str, float]] = field(default_factory=list)

    @contextmanager
    def stage(self, title: str, where: Path) -> Iterator[list[str]]:
        """Time a stage; the block appends its figures."""
        console.log(f"\n== {title} ==")
        started = time.monotonic()
        figures: list[str] = []
        yield figures
        self.rows.append((title, str(where), "\n".join(figures), time.monotonic() - started))


def run(settings: DemoSettings, options: RunOptions) -> None:
    """Make clips, label, cache, train both stages, merge, generate, inspect; print what came of it."""
    out = settings.output
    files.claim_output(out, options.overwrite)
    if options.dry_run:
        console.results.print(to_toml(settings), markup=False)
        return
    started = time.monotonic()
    diary = _Diary()
    clips = _prepare(settings, diary)
    _train(settings, diary)
    _videos(settings, diary, clips)
    with diary.stage("inspect-weights: what the weights say", out / "weights.json") as figures:
        _call("inspect-weights", files=[str(p) for p in _loras(out / "stage1").values()],
              json_file=str(out / "weights.json"))
        document = json.loads((out / "weights.json").read_text(encoding="utf-8"))
        ratio = document["ratios"]["delta_norm"]
        figures.append(f"high/low ΔW {ratio:.2f}, verdict {document['verdict']['status']}")
    _show(diary, time.monotonic() - started)


def _call(command: str, **options: Any) -> None:
    """Show a command as it would be typed, then run it; --overwrite, since the demo owns its folder."""
    row = next(c for c in COMMANDS if c.name == command)
    model = row.settings_model()
    flags = {f.key: f for f in flag_fields(model)}
    words = ["lapwan", command]
    for key, value in options.items():
        values = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        words += values if flags[key].flag.positional else [w for v in values for w in (flags[key].long_name, v)]
    console.log("$ " + shlex.join(words))
    row.run(load(model, options=options, environment={}), RunOptions(overwrite=True))


def _prepare(settings: DemoSettings, diary: _Diary) -> Path:
    out, defaults = settings.output, read_spec(tiny_folder("t2v")).defaults
    with diary.stage("clips: synthetic laparoscopic scenes", out / "clips") as figures:
        clips = write_dataset(out / "clips", settings.clips, settings.seed, defaults.size, defaults.num_frames)
        height, width = defaults.size
        figures.append(f"{settings.clips} clips, {defaults.num_frames} frames of {height}x{width}")
    with diary.stage("label: captions to instruments", out / "labels.jsonl") as figures:
        _call("label", clips=str(clips), output=str(out / "labels.jsonl"), report=str(out / "labels.report.json"))
        families = json.loads((out / "labels.report.json").read_text(encoding="utf-8"))["families"]
        figures.append(", ".join(f"{name} {count}" for name, count in families.items()))
    with diary.stage("cache: latents and text features", out / "cache") as figures:
        _call("cache", dataset=str(out / "labels.jsonl"), model="tiny", output=str(out / "cache"))
        figures.append(f"{settings.clips} clips, {_megabytes(out / 'cache'):.1f} MB")
    return clips


def _train(settings: DemoSettings, diary: _Diary) -> None:
    out = settings.output
    common = {"cache": str(out / "cache"), "steps": str(settings.steps), "seed": str(settings.seed), "lr": _LR}
    common = {_key(k): v for k, v in common.items()}
    with diary.stage("train-lora: stage 1, both noise experts", out / "stage1") as figures:
        _call("train-lora", **common, model="tiny", output=str(out / "stage1"))
        figures += _losses(out / "stage1")
    with diary.stage("merge: stage 1 into the model", out / "merged") as figures:
        _call("merge", model="tiny", lora=[f"{e.value}={p}" for e, p in _loras(out / "stage1").items()],
              output=str(out / "merged"))
        figures.append("both transformers, diffusers layout")
    with diary.stage("train-moe: stage 2, a mixture of four experts", out / "stage2") as figures:
        _call("train-moe", **common, model=str(out / "merged"), output=str(out / "stage2"))
        figures += _losses(out / "stage2")
        last = _metrics(out / "stage2")[-20:]
        accuracy = [row["metrics/routing_accuracy"] for row in last if row.get("metrics/routing_accuracy") is not None]
        figures.append(f"router agrees with the labels on {100 * _mean(accuracy):.0f} % of the last steps' clips")


def _key(option: str) -> str:
    return {"cache": "data.cache", "lr": "optimiser.lr"}.get(option, option)


def _videos(settings: DemoSettings, diary: _Diary, clips: Path) -> None:
    out = settings.output
    videos = out / "videos"
    first = videos / "first_frame.png"
    with diary.stage("generate: text to video, image to video", videos) as figures:
        seed = str(settings.seed)
        prompt = _PROMPTS["hook"]
        _call("generate", model="tiny", prompt=prompt, seed=seed, output=str(videos / "base_hook.mp4"))
        for name, text in _PROMPTS.items():
            _call("generate", model=str(out / "merged"), moe=str(out / "stage2" / "lapwan.safetensors"), prompt=text,
                  seed=seed, output=str(videos / f"mixture_{name}.mp4"))
        clip = next(iter(read_clips(clips)))
        source = resolve_video(clip.data["video_path"], clips)
        _save(Image.fromarray(_read(source)[0]), first)
        _call("generate", model="tiny-i2v", image=str(first), prompt=clip.caption, seed=seed,
              output=str(videos / "image_to_video.mp4"))
        made = sorted(videos.glob("*.mp4"))
        figures.append(f"{len(made)} videos and a sheet of them")
        _save(contact_sheet([_read(video) for video in made], 6, [video.stem for video in made]), videos / "sheet.png")


def _read(video: Path) -> np.ndarray:
    """All frames of a video of the demo's own shape."""
    defaults = read_spec(tiny_folder("t2v")).defaults
    return read_clip(video, defaults.num_frames, defaults.size, defaults.fps)


def _save(image: Image.Image, path: Path) -> None:
    with files.atomic_file(path) as temporary:
        image.save(temporary, format="PNG")


def _loras(run_folder: Path) -> dict[NoiseExpert, Path]:
    return {e: run_folder / f"lapwan_{e.file_suffix}.safetensors" for e in NoiseExpert}


def _metrics(run_folder: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (run_folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def _losses(run_folder: Path) -> list[str]:
    """Flow loss of each noise expert, mean of the first and of the last quarter of its steps."""
    lines = []
    rows = _metrics(run_folder)
    for expert in NoiseExpert:
        losses = [row["loss/diffusion"] for row in rows if row["noise_expert"] == expert.value]
        quarter = max(1, len(losses) // 4)
        lines.append(f"{expert.value} noise: flow loss {_mean(losses[:quarter]):.3f} -> {_mean(losses[-quarter:]):.3f}")
    return lines


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _show(diary: _Diary, seconds: float) -> None:
    table = Table(box=box.SIMPLE, show_lines=False)
    for column in ("stage", "result", "figures"):
        table.add_column(column, overflow="fold")
    table.add_column("seconds", justify="right")
    for title, where, figures, took in diary.rows:
        table.add_row(title.split(":")[0], where, figures, f"{took:.1f}")
    table.add_section()
    table.add_row("all", "", "", f"{seconds:.1f}")
    console.results.print(table)
