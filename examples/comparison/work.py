"""What a row of the comparison does, in a worker process: scenes, labels, caches, training, videos, routing.

Every row writes `row.json` into its folder last, with the settings that decide it: a row that has it is done.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.comparison.captions import paraphrases
from examples.comparison.families import merge_families, taxonomy_toml
from examples.comparison.settings import CONTINUED, MIXTURE, NONE, SAME_SIZE, TaskName
from examples.comparison.workspace import Workspace
from lapwan import console, files
from lapwan.commands import cache, label
from lapwan.data.labels import resolve_hint
from lapwan.data.taxonomy import Taxonomy, load_taxonomy
from lapwan.diagnostics.run_folder import METRICS_FILE
from lapwan.evaluation.arms import Arm, make_arm
from lapwan.evaluation.clips import EvaluationClip, read_eval_clips
from lapwan.evaluation.metrics import GeneratedVideo
from lapwan.evaluation.router_accuracy import fit_probe, routing_scores
from lapwan.evaluation.videos import Sampling, default_sampling, generate_and_score
from lapwan.models.base import Base
from lapwan.models.device import pick_device
from lapwan.names import NoiseExpert
from lapwan.sampling.generator import Generator
from lapwan.sampling.request import complete_guidance
from lapwan.settings.base import RunOptions, to_toml
from lapwan.settings.cache import CacheSettings
from lapwan.settings.label import LabelSettings
from lapwan.settings.lora_argument import LoraArgument
from lapwan.settings.model import BaseModelSettings
from lapwan.settings.train import TrainSettings
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.tiny.dataset import write_dataset
from lapwan.tiny.evaluators import load_evaluator, network_input, tip_hits, tip_position
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.resolve import resolve_base
from lapwan.train import recipe
from lapwan.train.callbacks.routing_windows import RoutingCallback
from lapwan.train.lora import recipe as lora_recipe
from lapwan.train.moe import recipe as moe_recipe
from lapwan.train.trainer import Trainer
from lapwan.wan.text import encode_text, load_text_encoder

ROW = "row.json"
TAXONOMY = "surgical4"
_NEVER = 10**9  # steps


class Judge:
    """`identity` and `seen_NAME`: which instrument is seen; `tip_accuracy`: as in `evaluation.metrics`.

    One pass of the network for both, on the comparison's device.
    """

    names = ("identity", *(f"seen_{name}" for name in INSTRUMENTS), "tip_accuracy")

    def __init__(self, device: torch.device) -> None:
        self._device, self._net = device, load_evaluator().to(device)

    @torch.no_grad()
    def score(self, video: GeneratedVideo) -> Mapping[str, float]:
        names, tip_maps = self._net(network_input(video.frames_THWC).to(self._device))
        seen = INSTRUMENTS[int(names.log_softmax(dim=1).mean(dim=0).argmax())]
        scores = {f"seen_{name}": float(name == seen) for name in INSTRUMENTS}
        scores["identity"] = float(seen == video.clip.instrument)
        truth = video.clip.tips_T2
        scores["tip_accuracy"] = float("nan")
        if truth is not None and len(truth) >= len(video.frames_THWC):
            hits = tip_hits(tip_position(tip_maps).cpu().numpy(), truth[: len(video.frames_THWC)], video.shape.size)
            scores["tip_accuracy"] = float(hits.mean()) if len(hits) else float("nan")
        return scores


def start_worker(threads: int) -> None:
    """What a worker process starts with."""
    torch.set_num_threads(threads)
    console.set_level(console.QUIET)


def scenes(workspace: Workspace, part: str) -> dict[str, Any]:
    """Clips of a part; each part has its own seed."""
    c = workspace.settings.clips
    seed = c.seed * 10 + ("train", "validation", "test").index(part)
    counts = {"train": c.train, "validation": c.validation, "test": c.test}
    write_dataset(workspace.data / part, counts[part], seed, c.size, c.frames, test_share=0.0)
    return {}


def labels(workspace: Workspace, taxonomy: str) -> dict[str, Any]:
    """Labels of the training clips in a taxonomy; one of merged families is written first."""
    if (families := workspace.settings.merged.get(taxonomy)) is not None:
        merged = merge_families(load_taxonomy(TAXONOMY), taxonomy, families)
        files.write_text(Path(workspace.taxonomy(taxonomy)), taxonomy_toml(merged))
    label.run(LabelSettings.model_validate({
        "clips": workspace.clips("train"), "output": workspace.labels(taxonomy),
        "taxonomy": workspace.taxonomy(taxonomy),
    }), RunOptions(overwrite=True))
    return {}


def caches(workspace: Workspace, task: TaskName) -> dict[str, Any]:
    """Latents, conditions and text features of the training clips."""
    c = workspace.settings.clips
    cache.run(CacheSettings.model_validate({
        "dataset": workspace.labels(TAXONOMY), "model": f"tiny-{task}", "output": workspace.cache(task),
        "device": workspace.device,
        "size": f"{c.size[0]}x{c.size[1]}", "num_frames": (c.frames,),
    }), RunOptions(overwrite=True))
    return {}


def train_stage1(workspace: Workspace, task: TaskName, folder: Path) -> dict[str, Any]:
    """Stage 1: what every arm starts from."""
    _trainer(_lora_settings(workspace, task, folder, f"tiny-{task}", workspace.settings.stage1)).fit()
    return {}


def train_arm(
    workspace: Workspace, task: TaskName, folder: Path, arm: str, lr: float, seed: int, ablation: str | None = None
) -> dict[str, Any]:
    """Train one arm from the merged stage 1, then judge it on the validation prompts."""
    settings = arm_settings(workspace, task, folder, arm, lr, seed, ablation)
    trainer = _trainer(settings)
    started = time.monotonic()
    trainer.fit()
    watch = trainer.callbacks.get("routing")
    faults = [str(fault) for fault in watch.faults] if isinstance(watch, RoutingCallback) else []
    trained = sum(p.numel() for p in trainer.parameters.values())
    del trainer
    scores = judge(workspace, task, arm_of(workspace, task, folder, arm), "validation")
    return {"validation": {name: float(np.nanmean(v)) if not np.isnan(v).all() else None for name, v in scores.items()},
            "parameters": trained, "training_seconds": time.monotonic() - started, "routing_faults": faults}


def arm_settings(
    workspace: Workspace, task: TaskName, folder: Path, arm: str, lr: float, seed: int, ablation: str | None = None
) -> TrainSettings:
    """The run of an arm: what all share, then its own, then an ablation's."""
    s = workspace.settings
    stage1 = {e.value: str(path) for e, path in workspace.stage1(task).items()}
    merged = {"model": f"tiny-{task}", "lora": stage1}
    shared = {**s.train, "seed": seed, "optimizer": {**s.train.get("optimizer", {}), "lr": lr}}
    if arm == CONTINUED:
        return _lora_settings(workspace, task, folder, f"tiny-{task}", {**shared, **s.continued, "init_lora": stage1})
    changes = {key: value for key, value in s.ablations.get(ablation or "", {}).items() if key != "arm"}
    if arm == SAME_SIZE:
        return _lora_settings(workspace, task, folder, merged, _overlay({**shared, **s.plain}, changes))
    arm_tree = _overlay(s.mixture, changes)
    name = str(arm_tree.pop("taxonomy", TAXONOMY))
    arm_tree = _overlay({"router": {"lr_scale": s.router_lr / lr}}, arm_tree)
    tree = _common(workspace, task, folder, merged, _overlay(shared, arm_tree))
    tree |= {"taxonomy": workspace.taxonomy(name)}
    tree["data"] = {**tree["data"], "labels": str(workspace.labels(name))}
    return TrainMoeSettings.model_validate(tree)


def _overlay(tree: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `tree`, section by section."""
    result = dict(tree)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and key != "patterns"
        result[key] = _overlay(result[key], value) if both else value
    return result


def _common(
    workspace: Workspace, task: TaskName, folder: Path, model: Any, arm_tree: Mapping[str, Any]
) -> dict[str, Any]:
    quiet = {"save_every": _NEVER, "log_every": 20, "watch": {"every": _NEVER}, "compile": "off", "memory": "both",
             "dtype": workspace.settings.dtype, "device": workspace.device}
    data = {"cache": str(workspace.cache(task)), **arm_tree.get("data", {})}
    return {**quiet, **arm_tree, "data": data, "model": model, "output": str(folder / "run")}


def _lora_settings(
    workspace: Workspace, task: TaskName, folder: Path, model: Any, arm_tree: Mapping[str, Any]
) -> TrainLoraSettings:
    return TrainLoraSettings.model_validate(_common(workspace, task, folder, model, arm_tree))


def _trainer(settings: TrainSettings) -> Trainer:
    """A trainer as the commands build it, in a fresh run folder."""
    base = resolve_base(settings.model)
    data, device = recipe.read_data(settings, base), pick_device(settings.device)
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / METRICS_FILE).unlink(missing_ok=True)
    files.write_text(settings.output / "settings.toml", to_toml(settings))
    if isinstance(settings, TrainMoeSettings):
        return moe_recipe.prepare(settings, base, data, load_taxonomy(settings.taxonomy), device)
    assert isinstance(settings, TrainLoraSettings)
    return lora_recipe.prepare(settings, base, data, device)


def stage1_base(workspace: Workspace, task: TaskName) -> Base:
    """The model with stage 1 merged in memory."""
    return resolve_base(BaseModelSettings(model=f"tiny-{task}", lora=workspace.stage1(task)))


def arm_of(workspace: Workspace, task: TaskName, folder: Path | None, arm: str, **choice: Any) -> Arm:
    """A trained arm, ready to generate; `choice`: hint, alpha_expert."""
    if arm == NONE or folder is None:
        return Arm(NONE, stage1_base(workspace, task))
    if arm == MIXTURE:
        path = folder / "run" / "lapwan.safetensors"
        return make_arm(arm, stage1_base(workspace, task), moe=path, **choice)
    loras = [LoraArgument(noise_expert=e, path=folder / "run" / f"lapwan_{e.file_suffix}.safetensors")
             for e in NoiseExpert]
    return make_arm(arm, resolve_base(f"tiny-{task}") if arm == CONTINUED else stage1_base(workspace, task), loras)


_GENERATORS: dict[TaskName, Generator] = {}  # of this worker process: text encoder and VAE are loaded once
_JUDGES: list[Judge] = []


def judge(workspace: Workspace, task: TaskName, arm: Arm, part: str) -> dict[str, np.ndarray]:
    """Every metric of every clip of a part: [P]."""
    device = pick_device(workspace.device)
    if task not in _GENERATORS:
        dtype = torch.bfloat16 if workspace.settings.dtype == "bf16" else torch.float32
        _GENERATORS[task] = Generator(arm.base, None, device, dtype, "both", "off", cache_conditions=True)
    if not _JUDGES:
        _JUDGES.append(Judge(device))
    clips = read_eval_clips(workspace.clips(part), load_taxonomy(TAXONOMY), split=None)
    scores = generate_and_score(_GENERATORS[task], arm, clips, sampling_of(workspace, arm.base), _JUDGES)
    return {name: values[:, 0] for name, values in scores.items()}


def sampling_of(workspace: Workspace, base: Base) -> Sampling:
    """The model's own sampling, changed where the settings say so."""
    s, c = workspace.settings.sampling, workspace.settings.clips
    defaults = default_sampling(base.spec, seeds=1, seed=s.seed, batch_size=s.batch_size)
    shape = replace(defaults.shape, frames=c.frames, size=c.size)
    guidance = defaults.guidance if s.guidance is None else complete_guidance(base.spec, s.guidance)
    return replace(defaults, shape=shape, steps=s.steps or defaults.steps, guidance=guidance)


def test_arm(
    workspace: Workspace, task: TaskName, folder: Path | None, arm: str, choice: Mapping[str, Any]
) -> dict[str, Any]:
    """An arm on the test prompts: every metric, clip by clip."""
    scores = judge(workspace, task, arm_of(workspace, task, folder, arm, **choice), "test")
    return {"scores": {name: [None if np.isnan(x) else float(x) for x in values] for name, values in scores.items()}}


def routing(workspace: Workspace, task: TaskName, folder: Path) -> dict[str, Any]:
    """The router on test captions and on captions without keywords, and a linear probe of the same features."""
    arm = arm_of(workspace, task, folder, MIXTURE)
    mixture = arm.adapters.mixture
    assert mixture is not None
    taxonomy = Taxonomy.from_dict(mixture.taxonomy)
    encoder = load_text_encoder(arm.base.spec)
    known = load_taxonomy(TAXONOMY)
    train = read_eval_clips(workspace.clips("train"), known, split=None)
    test = read_eval_clips(workspace.clips("test"), known, split=None)
    c = workspace.settings.clips
    sets = {"captions": [(clip.prompt, _instrument_of(clip)) for clip in test],
            "without keywords": paraphrases(c.paraphrases, c.seed)}

    def encoded(texts: Sequence[str]) -> list[torch.Tensor]:
        return [features.cpu() for text in texts for features in encode_text(encoder, [text])]

    def weights(instruments: Sequence[str]) -> list[tuple[float, ...]]:
        return [resolve_hint(name, taxonomy) for name in instruments]

    truth = torch.tensor(weights([_instrument_of(clip) for clip in train])).argmax(dim=1)
    probe = fit_probe(encoded([clip.prompt for clip in train]), truth, len(taxonomy.families))
    result: dict[str, Any] = {"families": list(taxonomy.keys)}
    for name, pairs in sets.items():
        features, labels_N = encoded([text for text, _ in pairs]), weights([instrument for _, instrument in pairs])
        scores = routing_scores(mixture, features, labels_N)
        right = probe.predict(features) == torch.tensor(labels_N).argmax(dim=1).numpy()
        result[name] = {
            "right": scores.right_N.tolist(), "probe": [float(x) for x in right],
            "confusion": scores.confusion_EE.tolist(), "entropy": float(scores.entropy_N.mean()),
        }
    return result


def _instrument_of(clip: EvaluationClip) -> str:
    assert clip.instrument is not None
    return clip.instrument


def timing(workspace: Workspace, folder: Path) -> dict[str, Any]:
    """Median seconds of an optimizer step, one run after the other, alone: plain LoRA of the same size, mixture."""
    seconds: dict[str, Any] = {}
    for arm in (SAME_SIZE, MIXTURE, SAME_SIZE, MIXTURE):  # twice, so that a warm-up shows
        settings = arm_settings(workspace, workspace.settings.tasks[0], folder, arm, workspace.settings.lrs[0], 1)
        settings = settings.model_copy(update={"steps": workspace.settings.timing_steps, "log_every": 1})
        trainer = _trainer(settings)
        trainer.fit()
        rows = [json.loads(line) for line in (settings.output / METRICS_FILE).read_text().splitlines()]
        seconds.setdefault(arm, []).append(statistics.median(row["seconds"] for row in rows[len(rows) // 3 :]))
    return seconds
