"""From `EvaluateSettings` to a checked study, and from its results to files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lapwan import files
from lapwan.caching.families import labels_in_order
from lapwan.caching.index import CachedItem, CacheIndex
from lapwan.caching.read import load_index
from lapwan.data.clips import empty_split
from lapwan.data.taxonomy import Taxonomy, load_taxonomy
from lapwan.errors import UserError
from lapwan.evaluation.arms import Arm, make_arm
from lapwan.evaluation.clips import EvaluationClip, VideoShape, evenly_spaced, read_eval_clips
from lapwan.evaluation.flow_losses import FlowPlan, check_labels, evaluation_clip
from lapwan.evaluation.metrics import Judge, JudgeMetrics, ReferenceMetrics, make_scorers
from lapwan.evaluation.plots import arm_sheet, draw_plot, side_by_side_sheet
from lapwan.evaluation.router_accuracy import ProbeSet
from lapwan.evaluation.study import ExecutionOptions, Study, StudyResults, check_taxonomies
from lapwan.evaluation.tables import IntervalRule, document
from lapwan.evaluation.videos import Sampling, VideoStore, request_for
from lapwan.models.base import Base
from lapwan.models.device import pick_device, pick_dtype
from lapwan.models.spec import ModelSpec, Task, task_named
from lapwan.names import NEGATIVE_PROMPT
from lapwan.rewards.base import Reward, RewardKinds
from lapwan.rewards.build import REWARD_KINDS, check_rewards, kind_of
from lapwan.sampling.request import complete_guidance
from lapwan.settings.evaluate import EvaluateSettings
from lapwan.settings.memory import precision_of
from lapwan.settings.model import ModelChoice
from lapwan.settings.rewards import RewardSettings
from lapwan.train.clip_store import check_cache

JSON_FILE = "evaluation.json"
_CEILING_METRICS = (JudgeMetrics, ReferenceMetrics)  # those that are meaningful for a reconstruction of the clip

# MODEL of the settings (None: not set) -> a checked base; the task decides if a name means several models.
Resolve = Callable[[ModelChoice | None, Task | None], Base]
JudgeOf = Callable[[Taxonomy, VideoShape], Judge]  # for clips labelled with the taxonomy, and videos of the shape


def make_study(
    settings: EvaluateSettings, resolve: Resolve, judge: Judge | None = None,
    probe_set: Callable[[ModelSpec], ProbeSet | None] | None = None, rewards: RewardKinds = REWARD_KINDS,
    judge_of: JudgeOf | None = None,
) -> Study:
    """Read and check everything that the settings name, without loading weights.

    Args:
        resolve: from MODEL to a base that can generate.
        judge: measures the metrics `identity` and `tip`.
        probe_set: captions for the linear probe of a model's text features; it returns None if it has none for it.
        rewards: kinds of rewards, by their settings.
        judge_of: makes the judge once the clips' taxonomy and the videos' shape are known, instead of `judge`.

    Raises:
        UserError: files that do not exist, or files and settings that do not fit together.
    """
    device = pick_device(settings.device)
    loss = settings.loss
    index = None if loss.cache is None else load_index(loss.cache, loss.labels)
    arms = _arms(settings, settings.task or task_named(index.task if index else None), resolve)
    taxonomy = check_taxonomies(arms, load_taxonomy(settings.taxonomy))
    items = [] if index is None else _items(settings, index, arms, taxonomy)
    spec = arms[0].base.spec
    videos: dict[str, Any] = {}
    if settings.videos.clips is not None:
        clips, sampling = _sampling(settings, arms, taxonomy)
        judge = judge if judge_of is None else judge_of(taxonomy, sampling.shape)
        loaders = _rewards(settings.videos.rewards or (), device, rewards)
        from_image = starts_from_image(settings, arms[0].base.spec)
        scorers = make_scorers(settings.videos.metrics, clips, from_image, sampling.shape, judge, loaders, device)
        ceiling = settings.videos.ceiling and not any(clip.reference_error(sampling.shape) for clip in clips)
        ceiling_scorers = [scorer for scorer in scorers if ceiling and isinstance(scorer, _CEILING_METRICS)]
        videos = {"clips": clips, "sampling": sampling, "scorers": scorers, "ceiling_scorers": ceiling_scorers}
    captions = _captions(settings, taxonomy, videos.get("clips", ()), items) if any(a.routed for a in arms) else {}
    probe = probe_set(arms[0].base.spec) if probe_set is not None and captions and settings.routing.probe else None
    # A judge that no scorer asks decides nothing: videos that were made before it was there are used again.
    asked = judge if any(isinstance(scorer, JudgeMetrics) for scorer in videos.get("scorers", ())) else None
    return Study(
        arms, taxonomy,
        ExecutionOptions(device, pick_dtype(settings.dtype, device), settings.memory, settings.compile,
                precision_of(settings.dtype), precision_of(settings.text_dtype)),
        index=index, items=items, flow=FlowPlan(
            loss.bins, loss.draws, settings.seed, loss.batch_size,
            first_frame=spec.clean_first_frame and starts_from_image(settings, spec)),
        captions=captions, probe=probe, judge=asked, depends_on=_depends_on(settings, asked, rewards),
        **videos,
    )


def starts_from_image(settings: EvaluateSettings, spec: ModelSpec) -> bool:
    """Whether clips are evaluated from their first frame: where the model requires it, or as `task` asks."""
    return spec.requires_image or (spec.takes_image and settings.task == "i2v")


def _arms(settings: EvaluateSettings, task: Task | None, resolve: Resolve) -> list[Arm]:
    bases: dict[str, Base] = {}
    arms = []
    for adapter in settings.compared():
        model = adapter.model if adapter.model is not None else settings.model
        if repr(model) not in bases:
            bases[repr(model)] = resolve(model, task)
        arms.append(make_arm(
            adapter.name, bases[repr(model)], adapter.lora, adapter.moe, adapter.any_base, settings.fold,
            settings.key_rule, hint=adapter.hint, alpha_base=adapter.alpha_base, alpha_expert=adapter.alpha_expert))
    if len({arm.base.task for arm in arms}) > 1:
        tasks = ", ".join(f"{arm.name} {arm.base.task}" for arm in arms)
        raise UserError(f"the adapters are on models of different tasks ({tasks}); evaluate them separately")
    return arms


def _items(
    settings: EvaluateSettings, index: CacheIndex, arms: Sequence[Arm], taxonomy: Taxonomy
) -> list[CachedItem]:
    splits = {item.split for item in index.items}
    whole = settings.split == "all" or splits == {None}
    items = [item for item in index.items if whole or item.split == settings.split]
    if not items:
        raise empty_split(index.folder, settings.split, splits, "set split, or hold some out")
    for base in {id(arm.base): arm.base for arm in arms}.values():
        check_cache(index, base.spec, items)
    items = evenly_spaced(items, settings.loss.count)
    if any(arm.adapters.mixture is not None for arm in arms):
        items = labels_in_order(index, items, taxonomy)
    for arm in arms:
        check_labels(arm, items, index.folder)
    return items


def _sampling(
    settings: EvaluateSettings, arms: Sequence[Arm], taxonomy: Taxonomy
) -> tuple[list[EvaluationClip], Sampling]:
    """The clips and the sampling of their videos; the first request of every arm is checked."""
    videos, spec = settings.videos, arms[0].base.spec
    assert videos.clips is not None
    clips = read_eval_clips(videos.clips, taxonomy, None if settings.split == "all" else settings.split, videos.count)
    defaults = spec.defaults
    shape = VideoShape(videos.num_frames or defaults.num_frames, videos.size or defaults.size, defaults.fps)
    negative = NEGATIVE_PROMPT if videos.negative_prompt is None else videos.negative_prompt
    from_image = starts_from_image(settings, spec)
    sampling = Sampling(
        shape, videos.steps or defaults.steps, complete_guidance(spec, videos.guidance), videos.seeds, settings.seed,
        videos.batch_size, from_image, negative, videos.flow_shift, videos.sampler, videos.guidance_interval,
        videos.last_image)
    spec.check_clip(shape.frames, *shape.size)
    for arm in arms:
        request_for(arm.base.spec, arm, clips[0], sampling, 0)
    if from_image:
        for clip in clips:
            clip.first_frame(shape)  # fails early on a file that cannot be read; the frame is kept
            if videos.last_image:
                clip.last_frame(shape)
    return clips, sampling


def _rewards(
    rewards: Sequence[RewardSettings], device: torch.device, kinds: RewardKinds
) -> dict[str, Callable[[], Reward]]:
    """Loaders of the rewards by label; their files are checked here."""
    check_rewards(rewards, kinds)
    return {reward.label: partial(kind_of(reward, kinds).make, reward, device) for reward in rewards}


def _depends_on(settings: EvaluateSettings, judge: Judge | None, kinds: RewardKinds) -> list[str]:
    depends_on = [reward_identity(reward, kinds) for reward in settings.videos.rewards or ()]
    return [*depends_on, judge.fingerprint] if judge is not None and judge.fingerprint else depends_on


def reward_identity(reward: RewardSettings, kinds: RewardKinds = REWARD_KINDS) -> str:
    """A reward's settings with size and time of its files: stored scores of other weights are not used."""
    settings = reward.model_dump(mode="json", exclude={"weight"})
    paths = [file for path in kind_of(reward, kinds).files(reward)
             for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in paths if file.is_file()]
    return json.dumps([settings, facts], sort_keys=True)


def _captions(
    settings: EvaluateSettings, taxonomy: Taxonomy, clips: Sequence[EvaluationClip], items: Sequence[CachedItem]
) -> dict[str, Sequence[EvaluationClip]]:
    """Captions for the router: a separate file, else those of the clips, else those of the cache."""
    routing, split = settings.routing, None if settings.split == "all" else settings.split
    cached = [evaluation_clip(item, len(taxonomy.families)) for item in items]
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
    """The store of a study's videos in `folder`, keyed by everything that their scores depend on."""
    execution = study.execution
    precisions = [str(form) for form in (execution.precision, execution.text_precision) if form is not None]
    return VideoStore(folder, str(execution.device.type), str(execution.dtype), *precisions, *study.depends_on)


def write_results(
    folder: Path, study: Study, results: StudyResults, interval: IntervalRule, store: VideoStore, sheet: int
) -> Path:
    """Contact sheets of `sheet` clips (0: none), the plot, and evaluation.json, whose path is returned."""
    if study.clips and sheet:
        _save(side_by_side_sheet(study, store, sheet), folder / "sheet.png")
        for arm in study.arms:
            _save(arm_sheet(study, store, arm.name, sheet), folder / f"sheet_{store.folder_of(arm).name}.png")
    _save(draw_plot(study, results, interval), folder / "evaluation.png")
    text = json.dumps(document(study, results, interval), ensure_ascii=False, indent=1)
    files.write_text(folder / JSON_FILE, text + "\n")
    return folder / JSON_FILE


def _save(image: Image.Image, path: Path) -> None:
    with files.atomic_file(path) as temporary:
        image.save(temporary, format="PNG")
