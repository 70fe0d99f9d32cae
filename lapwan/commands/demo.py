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
from lapwan.tiny.evaluators import evaluate_identity, load_evaluator, locate_tip, tip_hits
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.model import tiny_folder
from lapwan.train.metrics import METRICS_FILE
from lapwan.wan.folder import read_spec

_LR, _BATCH = "3e-3", "4"  # a small model takes a larger step than the default for the 14B one
# What the pretraining did not teach: which name belongs to which instrument.
_PROMPTS = {
    "scissors_1": "剪刀剪断血管", "scissors_2": "剪刀从上方进入，剪断组织",
    "hook_1": "电凝钩切割组织", "hook_2": "The hook dissects the adhesion",
    "suction_1": "吸引清理术野", "suction_2": "吸引管从左侧进入，吸净积血",
    "grasper_1": "抓钳抓取标本袋", "grasper_2": "The grasper lifts the tissue",
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
    files.write_text(out / "settings.toml", to_toml(settings, "lapwan demo --config with this file repeats the demo"))
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
        if key not in flags:
            words += ["--set", f"{key}={value}"]
        elif flags[key].flag.positional:
            words += values
        else:
            words += [word for v in values for word in (flags[key].long_name, v)]
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
    common = {"data.cache": str(out / "cache"), "steps": str(settings.steps), "batch_size": _BATCH,
              "seed": str(settings.seed), "optimiser.lr": _LR}
    with diary.stage("train-lora: stage 1, both noise experts", out / "stage1") as figures:
        _call("train-lora", **common, model="tiny", output=str(out / "stage1"))
        figures += _losses(out / "stage1")
    with diary.stage("merge: stage 1 into the model", out / "merged") as figures:
        _call("merge", model="tiny", lora=[f"{e.value}={p}" for e, p in _loras(out / "stage1").items()],
              output=str(out / "merged"))
        figures.append("both transformers, diffusers layout")
    with diary.stage("train-moe: stage 2, a mixture of four experts", out / "stage2") as figures:
        # The defaults keep router and gates at ten times the experts' lr, which here would be too much.
        _call("train-moe", **common, model=str(out / "merged"), output=str(out / "stage2"),
              **{"router.lr_scale": "0.5", "timestep_gate.lr_scale": "1"})
        figures += _losses(out / "stage2")
        last = _metrics(out / "stage2")[-20:]
        accuracy = [row["metrics/routing_accuracy"] for row in last if row.get("metrics/routing_accuracy") is not None]
        figures.append(f"router agrees with the labels on {100 * _mean(accuracy):.0f} % of the last steps' clips")


def _videos(settings: DemoSettings, diary: _Diary, clips: Path) -> None:
    out, seed = settings.output, str(settings.seed)
    prompts = out / "prompts.jsonl"
    lines = [{"prompt": text, "output": f"{name}.mp4"} for name, text in _PROMPTS.items()]
    files.write_text(prompts, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    arms = {
        "base": {"model": "tiny"}, "stage1": {"model": str(out / "merged")},
        "stage2": {"model": str(out / "merged"), "moe": str(out / "stage2" / "lapwan.safetensors")},
    }
    with diary.stage("generate: text to video", out / "videos") as figures:
        for arm, options in arms.items():
            _call("generate", **options, prompts=str(prompts), seed=seed, output=str(out / "videos" / arm))
            videos = {name: _read(out / "videos" / arm / f"{name}.mp4") for name in _PROMPTS}
            figures.append(f"{arm}: {_named(videos)} of {len(videos)} show the named instrument")
            _save(contact_sheet(list(videos.values()), 6, list(videos)), out / "videos" / f"{arm}.png")
        figures.append("so few videos are an impression, not a measurement")
    with diary.stage("generate: image to video", out / "videos" / "image_to_video.mp4") as figures:
        clip = next(iter(read_clips(clips)))
        truth = _read(resolve_video(clip.data["video_path"], clips))
        _save(Image.fromarray(truth[0]), out / "videos" / "first_frame.png")
        video = out / "videos" / "image_to_video.mp4"
        _call("generate", model="tiny-i2v", image=str(out / "videos" / "first_frame.png"), prompt=clip.caption,
              seed=seed, output=str(video))
        made = _read(video)
        hits = tip_hits(locate_tip(made), np.array(clip.data["tip"]), made.shape[1:3])
        figures.append(f"tip within 5 % of the diagonal in {int(hits.sum())} of {len(hits)} frames")
        _save(contact_sheet([truth, made], 6, ["the clip", "from its first frame"]), video.with_suffix(".png"))


def _named(videos: Mapping[str, np.ndarray]) -> int:
    """In how many videos the evaluator sees the instrument that the prompt names."""
    net = load_evaluator()
    seen = {name: INSTRUMENTS[int(evaluate_identity(frames, net).argmax())] for name, frames in videos.items()}
    return sum(name.startswith(instrument) for name, instrument in seen.items())


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
