"""`lapwan demo`: the whole pipeline on the embedded model, each stage as the command a user would type."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from lapwan import console, files
from lapwan.commands.demo_page import WEIGHTS_PAGE, demo_page
from lapwan.commands.run_setup import output_lock
from lapwan.commands.table import COMMANDS
from lapwan.data.clip_file import read_clips, to_line
from lapwan.diagnostics.run_folder import METRICS_FILE
from lapwan.errors import Interrupted
from lapwan.memory.throughput import product_rate
from lapwan.models.device import pick_device
from lapwan.models.spec import read_spec
from lapwan.names import NoiseExpert
from lapwan.report.page import PAGE_FILE, write_page
from lapwan.sampling.result import read_metadata
from lapwan.settings.base import RunOptions, flag_fields, to_toml
from lapwan.settings.demo import DemoSettings
from lapwan.settings.evaluate import EvaluateSettings
from lapwan.settings.load import load
from lapwan.tiny.dataset import write_dataset
from lapwan.tiny.model import tiny_folder

# A small model takes a larger step than the default for the 14B one; rank 2 leaves the four experts something to add.
_TRAINING = {"batch_size": "4", "roi_weight": "3", "targets.patterns": '{"blocks.*" = 2}', "save_every": "72"}
_LR_1, _LR_2 = "8e-3", "6e-3"  # of the two stages
_PROMPT = "电凝钩切割组织"
_HELD_OUT = 1000  # added to the seed: scenes that training has not seen
_STAGE = RunOptions(overwrite=True, lock=False)  # the folder is the demo's, and so is its lock


@dataclass
class _Summary:
    """The closing table: per stage its title, the path of its result, figures, and seconds."""

    rows: list[tuple[str, str, str, float]] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # evaluation.json by T2V and I2V

    @contextmanager
    def stage(self, title: str, path: Path) -> Iterator[list[str]]:
        """Time a stage; the block appends its figures."""
        console.log(f"\n== {title} ==")
        started = time.monotonic()
        figures: list[str] = []
        yield figures
        self.rows.append((title, str(path), "\n".join(figures), time.monotonic() - started))


def run(settings: DemoSettings, options: RunOptions) -> None:
    """Make clips, label, cache, train both stages, merge, generate, evaluate, inspect; print the results."""
    with output_lock(settings.output, options):
        try:
            _run(settings, options)
        except Interrupted:  # of a stage: what repeats is the demo as a whole
            raise KeyboardInterrupt from None


def _run(settings: DemoSettings, options: RunOptions) -> None:
    out = settings.output
    files.claim_output(out, options.overwrite)
    if options.dry_run:
        console.results.print(to_toml(settings), markup=False)
        console.log(f"page: {out / PAGE_FILE}, for a browser: results and videos of all stages")
        return
    files.write_text(out / "settings.toml", to_toml(settings, "lapwan demo --config with this file repeats the demo"))
    started = time.monotonic()
    summary = _Summary()
    _prepare(settings, summary)
    _train(settings, summary)
    _generate(settings, summary)
    _evaluate(settings, summary)
    with summary.stage("inspect-weights: what the weights say", out / "weights.json") as figures:
        _call("inspect-weights", files=[str(p) for p in _loras(out / "stage1").values()],
              json_file=str(out / "weights.json"), page=str(out / WEIGHTS_PAGE))
        document = json.loads((out / "weights.json").read_text(encoding="utf-8"))
        ratio = document["ratios"]["delta_norm"]
        figures.append(f"high/low ΔW {ratio:.2f}, verdict {document['verdict']['status']}")
    tables = _tables(summary, time.monotonic() - started)
    for table in tables:
        console.results.print(table)
    if write_page(out / PAGE_FILE, demo_page(out, tables, summary.evaluations, to_toml(settings))):
        console.results.print(f"page: {out / PAGE_FILE}", markup=False)


def _call(command: str, **options: Any) -> None:
    """Log a command as a user would type it, then run it with --overwrite, since the folder is the demo's."""
    row = next(c for c in COMMANDS if c.name == command)
    model = row.settings_model()
    flags = {f.key: f for f in flag_fields(model)}
    words = ["lapwan", command]
    sets: list[str] = []
    for key, value in options.items():
        values = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        if key not in flags:
            sets.append(f"{key}={value}")
            words += ["--set", sets[-1]]
        elif flags[key].flag.positional:
            words += values
        else:
            words += [word for v in values for word in (flags[key].long_name, v)]
    console.log("$ " + shlex.join(words))
    given = {key: value for key, value in options.items() if key in flags}
    row.run(load(model, sets=sets, options=given, environment={}), _STAGE)


def _prepare(settings: DemoSettings, summary: _Summary) -> None:
    out, defaults = settings.output, read_spec(tiny_folder("t2v")).defaults
    with summary.stage("clips: synthetic laparoscopic scenes", out / "clips") as figures:
        shape = defaults.size, defaults.num_frames
        cores = min(8, os.cpu_count() or 1)
        clips = write_dataset(out / "clips", settings.clips, settings.seed, *shape, workers=cores)
        # Held-out clips to evaluate on, without the captions that training has seen.
        held_out = write_dataset(
            out / "held_out", settings.prompts, settings.seed + _HELD_OUT, *shape, test_share=1.0)
        seen = {clip.caption for clip in read_clips(clips)}
        unseen = [clip.data for clip in read_clips(held_out) if clip.caption not in seen]
        files.write_text(held_out, "".join(to_line(data) for data in unseen))
        height, width = defaults.size
        figures.append(f"{settings.clips} clips, {defaults.num_frames} frames of {height}x{width}; "
                       f"{len(unseen)} more with captions that training does not see")
    with summary.stage("label: captions to instruments", out / "labels.jsonl") as figures:
        _call("label", clips=str(clips), output=str(out / "labels.jsonl"), report=str(out / "labels.report.json"))
        families = json.loads((out / "labels.report.json").read_text(encoding="utf-8"))["families"]
        figures.append(", ".join(f"{name} {count}" for name, count in families.items()))
    with summary.stage("cache: latents and text features", out / "cache") as figures:
        _call("cache", dataset=str(out / "labels.jsonl"), model="tiny", output=str(out / "cache"))
        figures.append(f"{settings.clips} clips, {_megabytes(out / 'cache'):.1f} MB")


def _train(settings: DemoSettings, summary: _Summary) -> None:
    out = settings.output
    common = {"data.cache": str(out / "cache"), "steps": str(settings.steps), "seed": str(settings.seed), **_TRAINING}
    with summary.stage("train-lora: stage 1, both noise experts", out / "stage1") as figures:
        _call("train-lora", **common, model="tiny", output=str(out / "stage1"), **{"optimizer.lr": _LR_1})
        figures += _losses(out / "stage1")
    with summary.stage("merge: stage 1 into the model", out / "merged") as figures:
        _call("merge", model="tiny", lora=[f"{e.value}={p}" for e, p in _loras(out / "stage1").items()],
              output=str(out / "merged"))
        figures.append("both transformers, diffusers layout")
    with summary.stage("train-moe: stage 2, a mixture of four experts", out / "stage2") as figures:
        # By default router and gates have ten times the experts' lr, too much for this small model.
        _call("train-moe", **common, model=str(out / "merged"), output=str(out / "stage2"),
              **{"optimizer.lr": _LR_2, "router.lr_scale": "0.5", "timestep_gate.lr_scale": "1"})
        figures += _losses(out / "stage2")
        last = _metrics(out / "stage2")[-20:]
        accuracy = [row["metrics/routing_accuracy"] for row in last if row.get("metrics/routing_accuracy") is not None]
        figures.append(f"router agrees with the labels on {100 * _mean(accuracy):.0f} % of the last steps' clips")


def _generate(settings: DemoSettings, summary: _Summary) -> None:
    out = settings.output
    with summary.stage("generate: a prompt to a video", out / "hook.mp4") as figures:
        _call("generate", model=str(out / "merged"), moe=str(out / "stage2" / "lapwan.safetensors"), prompt=_PROMPT,
              seed=str(settings.seed), output=str(out / "hook.mp4"))
        mix = json.loads(read_metadata(out / "hook.mp4")["facts"])["moe"]["mix"]
        figures.append("the router's mix: " + ", ".join(f"{name} {share:.2f}" for name, share in mix.items()))


def _evaluate(settings: DemoSettings, summary: _Summary) -> None:
    """Base, stage 1 and stage 2 on the same prompts and noise: text to video, then from first frames."""
    out = settings.output
    moe, loras = out / "stage2" / "lapwan.safetensors", {e.value: p for e, p in _loras(out / "stage1").items()}
    both: dict[str, Any] = {"output": out / "t2v", "seed": settings.seed, "device": "auto"}
    videos = {"clips": out / "held_out" / "clips.jsonl", "count": settings.prompts, "batch_size": 12}
    with summary.stage("evaluate: text to video", out / "t2v") as figures:
        adapters = [{"name": "base"}, {"name": "stage 1", "model": str(out / "merged")},
                    {"name": "stage 2", "model": str(out / "merged"), "moe": moe}]
        evaluation = summary.evaluations["T2V"] = _compare(EvaluateSettings.model_validate(
            {**both, "model": "tiny", "adapters": adapters, "routing": {"probe": False},
             "videos": {**videos, "ceiling": False, "metrics": ["identity"]}}))
        routing = evaluation["routing"]
        figures.append(f"router right on {100 * routing['accuracy']:.0f} % of {routing['n']} held-out captions")
    with summary.stage("evaluate: image to video", out / "i2v") as figures:
        merged = {"model": "tiny-i2v", "lora": loras}
        adapters = [{"name": "base"}, {"name": "stage 1", "model": merged},
                    {"name": "stage 2", "model": merged, "moe": moe, "any_base": True}]
        few = {**videos, "count": max(1, 3 * settings.prompts // 8), "metrics": ["identity", "tip"], "sheet": 4}
        summary.evaluations["I2V"] = _compare(EvaluateSettings.model_validate(
            {**both, "output": out / "i2v", "model": "tiny-i2v", "adapters": adapters, "videos": few,
             "routing": {"probe": False}}))
        figures.append("both stages were trained on text to video")


def _compare(settings: EvaluateSettings) -> dict[str, Any]:
    """Run `evaluate` from a TOML file that stays beside the output; its evaluation.json."""
    config = settings.output.with_suffix(".toml")
    files.write_text(config, to_toml(settings))
    console.log(f"$ lapwan evaluate --config {shlex.quote(str(config))}")
    row = next(c for c in COMMANDS if c.name == "evaluate")
    row.run(load(row.settings_model(), config=config, environment={}), _STAGE)
    document: dict[str, Any] = json.loads((settings.output / "evaluation.json").read_text(encoding="utf-8"))
    return document


def _percent(estimate: Mapping[str, Any]) -> str:
    low, high = estimate["ci95"] or (estimate["mean"], estimate["mean"])
    return f"{100 * estimate['mean']:.0f} [{100 * low:.0f},{100 * high:.0f}]"


def _loras(run_folder: Path) -> dict[NoiseExpert, Path]:
    return {e: run_folder / f"lapwan_{e.file_suffix}.safetensors" for e in NoiseExpert}


def _metrics(run_folder: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (run_folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def _losses(run_folder: Path) -> list[str]:
    """Flow loss of each noise expert: means over the first and over the last quarter of its steps."""
    lines = []
    rows = _metrics(run_folder)
    for noise_expert in NoiseExpert:
        losses = [row["loss/diffusion"] for row in rows if row["noise_expert"] == noise_expert.value]
        quarter = max(1, len(losses) // 4)
        first, last = _mean(losses[:quarter]), _mean(losses[-quarter:])
        lines.append(f"{noise_expert.value} noise: flow loss {first:.3f} -> {last:.3f}")
    return lines


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _tables(summary: _Summary, seconds: float) -> tuple[Table, Table]:
    """The stages, and the adapters compared."""
    table = Table(box=box.SIMPLE, show_lines=False)
    for column in ("stage", "result", "figures"):
        table.add_column(column, overflow="fold")
    table.add_column("seconds", justify="right")
    for title, path, figures, stage_seconds in summary.rows:
        table.add_row(title.split(":")[0], path, figures, f"{stage_seconds:.1f}")
    table.add_section()
    device = pick_device("auto")
    rate = product_rate(device, torch.float32) / 1e9
    speed = f"on {device}: fp32 products at {rate:.0f} GFLOP/s, {os.cpu_count()} CPU cores"
    table.add_row("all", "", speed, f"{seconds:.1f}")
    return table, _comparison(summary.evaluations)


def _comparison(evaluations: Mapping[str, Mapping[str, Any]]) -> Table:
    """Identity and tip accuracy, one column per adapter."""
    table = Table(title="% with 95 % interval: the named instrument is seen; its tip is in the right place",
                  title_justify="left", box=box.SIMPLE)
    arms = list(next(iter(evaluations.values()))["generation"])
    for column in ("", "n", *arms, "VAE"):
        table.add_column(column, justify="left" if column == "" else "right")
    for task, document in evaluations.items():
        for metric in ("identity", "tip_accuracy"):
            by_arm = [document["generation"][name].get(metric) for name in arms]
            if None not in by_arm:
                ceiling = document["ceiling"].get(metric)
                table.add_row(f"{metric.split('_')[0]} {task}", str(by_arm[0]["n"]), *map(_percent, by_arm),
                              "" if ceiling is None else _percent(ceiling))
    return table
