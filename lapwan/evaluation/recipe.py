"""From `EvaluateSettings` to a study that is checked and ready to run, and from its findings to files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lapwan import files
from lapwan.caching.index import CachedItem, CacheIndex
from lapwan.caching.read import load_index
from lapwan.data.taxonomy import Taxonomy, load_taxonomy
from lapwan.errors import UserError
from lapwan.evaluation.arms import Arm, make_arm
from lapwan.evaluation.clips import EvaluationClip, VideoShape, read_eval_clips, spread
from lapwan.evaluation.engine import Sampling, request_for
from lapwan.evaluation.flow import FlowPlan, check_labels, clip_of
from lapwan.evaluation.judge import Judge
from lapwan.evaluation.metrics import Judged, Reference, make_scorers
from lapwan.evaluation.plots import arm_sheet, picture, side_by_side_sheet
from lapwan.evaluation.routing import ProbeSet
from lapwan.evaluation.store import VideoStore
from lapwan.evaluation.study import Findings, Machine, Study, check_taxonomies
from lapwan.evaluation.tables import Interval, document
from lapwan.models.base import Base
from lapwan.models.device import pick_device, pick_dtype
from lapwan.models.spec import ModelSpec, Task, check_frames, check_size
from lapwan.rewards.base import Reward
from lapwan.rewards.build import Maker, build_rewards, check_rewards
from lapwan.sampling.request import OFFICIAL_NEGATIVE_PROMPT, complete_guidance
from lapwan.settings.evaluate import EvaluateSettings
from lapwan.settings.memory import precision_of
from lapwan.settings.model import ModelChoice
from lapwan.settings.rewards import RewardSettings
from lapwan.train.clip_store import check_cache

JSON_FILE = "evaluation.json"
_BOUNDED = (Judged, Reference)  # what a reconstruction of the clip itself can be asked

# MODEL as the settings have it (None: none is named) -> a checked base; the task chooses where a name serves several.
Resolve = Callable[[ModelChoice | None, Task | None], Base]


def prepare(
    settings: EvaluateSettings, resolve: Resolve, judge: Judge | None = None,
    probe_set: Callable[[ModelSpec], ProbeSet | None] | None = None, rewards: Mapping[str, Maker] | None = None,
) -> Study:
    """Read and check all that is named, without loading weights.

    Args:
        resolve: from MODEL to a base that can generate.
        judge: gives the metrics `identity` and `tip`.
        probe_set: captions for the linear probe of a model's text features; None where there are none for it.
        rewards: makers of rewards that `lapwan.rewards` does not know, by their type.

    Raises:
        UserError: what does not exist or does not fit together.
    """
    device = pick_device(settings.device)
    loss = settings.loss
    index = None if loss.cache is None else load_index(loss.cache, loss.labels)
    arms = _arms(settings, settings.task or _task(index), resolve)
    taxonomy = check_taxonomies(arms, load_taxonomy(settings.taxonomy))
    items = [] if index is None else _items(settings, index, arms)
    videos: dict[str, Any] = {}
    if settings.videos.clips is not None:
        clips, sampling = _sampling(settings, arms, taxonomy)
        loaders = _rewards(settings.videos.rewards or (), device, rewards or {})
        task = arms[0].base.task
        scorers = make_scorers(settings.videos.metrics, clips, task, sampling.shape, judge, loaders, device)
        bounded = [scorer for scorer in scorers if isinstance(scorer, _BOUNDED) and settings.videos.ceiling]
        if any(clip.lacking(sampling.shape) for clip in clips):
            bounded = []
        videos = {"clips": clips, "sampling": sampling, "scorers": scorers, "bounded": bounded}
    captions = _captions(settings, taxonomy, videos.get("clips", ()), items) if any(a.routed for a in arms) else {}
    probe = probe_set(arms[0].base.spec) if probe_set is not None and captions and settings.routing.probe else None
    return Study(
        arms, taxonomy,
        Machine(device, pick_dtype(settings.dtype, device), settings.memory, settings.compile,
                precision_of(settings.dtype), precision_of(settings.text_dtype)),
        index=index, items=items, flow=FlowPlan(loss.bins, loss.draws, settings.seed, loss.batch_size),
        captions=captions, probe=probe, decides=_decides(settings, judge), **videos,
    )


def _arms(settings: EvaluateSettings, task: Task | None, resolve: Resolve) -> list[Arm]:
    bases: dict[str, Base] = {}
    arms = []
    for adapter in settings.compared():
        model = adapter.model if adapter.model is not None else settings.model
        if repr(model) not in bases:
            bases[repr(model)] = resolve(model, task)
        arms.append(make_arm(
            adapter.name, bases[repr(model)], adapter.lora, adapter.moe, adapter.any_base, settings.fold,
            hint=adapter.hint, alpha_base=adapter.alpha_base, alpha_expert=adapter.alpha_expert))
    if len({arm.base.task for arm in arms}) > 1:
        tasks = ", ".join(f"{arm.name} {arm.base.task}" for arm in arms)
        raise UserError(f"the adapters are on models of different tasks ({tasks}); evaluate them apart")
    return arms


def _task(index: CacheIndex | None) -> Task | None:
    """What the cache was made for."""
    if index is None or index.task is None:
        return None
    return "i2v" if index.task == "i2v" else "t2v"


def _items(settings: EvaluateSettings, index: CacheIndex, arms: Sequence[Arm]) -> list[CachedItem]:
    splits = {item.split for item in index.items}
    whole = settings.split == "all" or splits == {None}
    items = [item for item in index.items if whole or item.split == settings.split]
    if not items:
        raise UserError(f"{index.folder} has no clips of split '{settings.split}' (it has: "
                        f"{', '.join(sorted(map(str, splits)))}); set split, or hold some out")
    for base in {id(arm.base): arm.base for arm in arms}.values():
        check_cache(index, base.spec, items)
    items = spread(items, settings.loss.count)
    for arm in arms:
        check_labels(arm, items, index.folder)
    return items


def _sampling(
    settings: EvaluateSettings, arms: Sequence[Arm], taxonomy: Taxonomy
) -> tuple[list[EvaluationClip], Sampling]:
    """The clips and how their videos are made; the first request of every arm is checked."""
    videos, spec = settings.videos, arms[0].base.spec
    assert videos.clips is not None
    clips = read_eval_clips(videos.clips, taxonomy, None if settings.split == "all" else settings.split, videos.count)
    defaults = spec.defaults
    shape = VideoShape(videos.num_frames or defaults.num_frames, videos.size or defaults.size, defaults.fps)
    negative = OFFICIAL_NEGATIVE_PROMPT if videos.negative_prompt is None else videos.negative_prompt
    sampling = Sampling(
        shape, videos.steps or defaults.steps, complete_guidance(spec, videos.guidance), videos.seeds, settings.seed,
        videos.batch_size, negative, videos.flow_shift, videos.sampler, videos.guidance_interval)
    check_frames(shape.frames, spec.temporal_stride)
    check_size(*shape.size, spec.pixel_multiple)
    for arm in arms:
        request_for(arm.base.spec, arm, clips[0], sampling, 0)
    if spec.task == "i2v":
        for clip in clips:
            clip.first_frame(shape)  # read now, kept: one that cannot be read is found before the work
    return clips, sampling


def _rewards(
    rewards: Sequence[RewardSettings], device: torch.device, makers: Mapping[str, Maker]
) -> dict[str, Callable[[], Reward]]:
    """How to load each reward, by its label; their files are checked."""
    check_rewards(rewards)
    return {reward.label: partial(_load_reward, reward, device, makers) for reward in rewards}


def _load_reward(reward: RewardSettings, device: torch.device, makers: Mapping[str, Maker]) -> Reward:
    return build_rewards((reward,), device, makers)[reward.label]


def _decides(settings: EvaluateSettings, judge: Judge | None) -> list[str]:
    decides = [reward_identity(reward) for reward in settings.videos.rewards or ()]
    return [*decides, judge.fingerprint] if judge is not None and judge.fingerprint else decides


def reward_identity(reward: RewardSettings) -> str:
    """Its settings with size and time of its files: scores of other weights are not those of a finished video."""
    settings = reward.model_dump(mode="json", exclude={"weight"})
    path = getattr(reward, "path", None)  # the tiny one has none
    paths = sorted(path.iterdir()) if path is not None and path.is_dir() else [path] if path is not None else []
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in paths if file.is_file()]
    return json.dumps([settings, facts], sort_keys=True)


def _captions(
    settings: EvaluateSettings, taxonomy: Taxonomy, clips: Sequence[EvaluationClip], items: Sequence[CachedItem]
) -> dict[str, Sequence[EvaluationClip]]:
    """Captions for the router: a file of their own, else those of the clips, else those of the cache."""
    routing, split = settings.routing, None if settings.split == "all" else settings.split
    cached = [clip_of(item, len(taxonomy.families)) for item in items]
    sets: dict[str, Sequence[EvaluationClip]] = {}
    if routing.captions is not None:
        sets["captions"] = read_eval_clips(routing.captions, taxonomy, split)
    elif clips or any(clip.weights for clip in cached):
        sets["captions"] = clips or [clip for clip in cached if clip.weights]
    if routing.paraphrases is not None:
        sets["paraphrases"] = read_eval_clips(routing.paraphrases, taxonomy, split)
    for name, captions in sets.items():
        if all(clip.fallback for clip in captions):
            raise UserError(f"none of the {len(captions)} {name} has a label or names an instrument of taxonomy "
                            f"{taxonomy.name}; give them \"instrument_label\"")
    return sets


def open_store(study: Study, folder: Path) -> VideoStore:
    """The videos of a study, kept in a folder with all that their scores depend on."""
    machine = study.machine
    precisions = [str(form) for form in (machine.precision, machine.text_precision) if form is not None]
    return VideoStore(folder, str(machine.device.type), str(machine.dtype), *precisions, *study.decides)


def write_findings(
    folder: Path, study: Study, findings: Findings, interval: Interval, store: VideoStore, sheet: int
) -> Path:
    """Contact sheets of `sheet` clips (0: none), the plot, and evaluation.json, whose path is returned."""
    if study.clips and sheet:
        _save(side_by_side_sheet(study, store, sheet), folder / "sheet.png")
        for arm in study.arms:
            _save(arm_sheet(study, store, arm.name, sheet), folder / f"sheet_{store.folder_of(arm).name}.png")
    _save(picture(study, findings, interval), folder / "evaluation.png")
    text = json.dumps(document(study, findings, interval), ensure_ascii=False, indent=1)
    files.write_text(folder / JSON_FILE, text + "\n")
    return folder / JSON_FILE


def _save(image: Image.Image, path: Path) -> None:
    with files.atomic_file(path) as temporary:
        image.save(temporary, format="PNG")
