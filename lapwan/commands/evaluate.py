"""`lapwan evaluate`: adapters on held-out clips at equal noise: losses, routing, videos, with intervals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lapwan import console, files
from lapwan.commands.base import resolve_base
from lapwan.commands.model import TINY
from lapwan.commands.plan import print_plan
from lapwan.data.cachefile import CachedItem, CacheIndex, load_index
from lapwan.data.taxonomy import Taxonomy, load_taxonomy
from lapwan.errors import Interrupted, UserError
from lapwan.evaluation.arms import Arm, make_arm
from lapwan.evaluation.clips import EvalClip, VideoShape, read_eval_clips, spread
from lapwan.evaluation.engine import Sampling, request_for
from lapwan.evaluation.flow import FlowPlan, check_labels, clip_of
from lapwan.evaluation.metrics import make_scorers
from lapwan.evaluation.picture import picture
from lapwan.evaluation.report import Interval, document, tables
from lapwan.evaluation.scorers import Identity, Reference, TipAccuracy, names_of
from lapwan.evaluation.sheets import arm_sheet, side_by_side_sheet
from lapwan.evaluation.store import VideoStore
from lapwan.evaluation.study import Findings, Machine, Study, check_taxonomies, run_study
from lapwan.rewards.base import Reward
from lapwan.rewards.build import build_rewards, check_rewards
from lapwan.sampling.request import OFFICIAL_NEGATIVE_PROMPT, complete_guidance
from lapwan.settings.base import to_toml
from lapwan.settings.evaluate import EvaluateSettings
from lapwan.settings.memory import precision_of
from lapwan.settings.model_files import BaseModelSettings
from lapwan.settings.reward import RewardSettings
from lapwan.settings.run import RunOptions
from lapwan.tiny.model import tiny_folder
from lapwan.tiny.reward import make_tiny_reward
from lapwan.train.data import check_cache
from lapwan.wan.base import Base
from lapwan.wan.device import pick_device, pick_dtype
from lapwan.wan.folder import ModelSpec, Task, check_frames, check_size, read_spec
from lapwan.wan.identity import vae_identity

JSON_FILE = "evaluation.json"
_BOUNDED = (Identity, TipAccuracy, Reference)  # what a reconstruction of the clip itself can be asked


def run(settings: EvaluateSettings, options: RunOptions) -> None:
    """Check everything, then measure; `--dry-run` stops after the checks."""
    evaluate(settings, options)


def evaluate(settings: EvaluateSettings, options: RunOptions) -> dict[str, Any] | None:
    """The document that is written as evaluation.json; None under `--dry-run`."""
    out = settings.output
    if not settings.resume:
        if (out / "videos").is_dir() and not options.overwrite:
            raise UserError(f"output exists: {out}; pass --resume to go on with it (finished videos that still fit are "
                            "used), --overwrite to start over, or choose another path")
        files.claim_output(out, options.overwrite)
    study = prepare(settings)
    print_plan(settings, _plan(settings, study), options)
    if options.dry_run:
        return None
    if options.overwrite and not settings.resume:
        shutil.rmtree(out / "videos", ignore_errors=True)
    files.write_text(out / "settings.toml", to_toml(settings, "lapwan evaluate --config with this file repeats it"))
    forms = [str(form) for form in (study.machine.precision, study.machine.text_precision) if form is not None]
    rewards = [_reward_identity(one) for one in settings.videos.rewards or ()]
    store = VideoStore(out / "videos", str(study.machine.device.type), str(study.machine.dtype), *forms, *rewards)
    try:
        found = run_study(study, store)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; finished videos are kept in {store.folder}: the same command with --resume "
                          "goes on") from None
    return _write(settings, study, found, store)


def prepare(settings: EvaluateSettings) -> Study:
    """Read and check all that is named, without loading weights.

    Raises:
        UserError: what does not exist or does not fit together.
    """
    device = pick_device(settings.device)
    loss = settings.loss
    index = None if loss.cache is None else load_index(loss.cache, loss.labels)
    arms = _arms(settings, settings.task or _task(index))
    taxonomy = check_taxonomies(arms, load_taxonomy(settings.taxonomy))
    items = [] if index is None else _items(settings, index, arms)
    videos: dict[str, Any] = {} if settings.videos.clips is None else _videos(settings, arms, taxonomy, device)
    captions = _captions(settings, taxonomy, videos.get("clips", ()), items) if any(a.routed for a in arms) else {}
    return Study(
        arms, taxonomy,
        Machine(device, pick_dtype(settings.dtype, device), settings.memory, settings.compile,
                precision_of(settings.dtype), precision_of(settings.text_dtype)),
        index=index, items=items, flow=FlowPlan(loss.bins, loss.draws, settings.seed, loss.batch_size),
        captions=captions, probe=settings.routing.probe and _is_tiny(arms[0].base.spec), **videos,
    )


def _arms(settings: EvaluateSettings, task: Task | None) -> list[Arm]:
    bases: dict[str, Base] = {}
    made = []
    for own in settings.compared():
        model = own.model if own.model is not None else settings.model if settings.model is not None else TINY
        if repr(model) not in bases:
            named = model.model if isinstance(model, BaseModelSettings) else model
            bases[repr(model)] = resolve_base(model, task if named == TINY else None, generation=True)
        made.append(make_arm(
            own.name, bases[repr(model)], own.lora, own.moe, own.any_base, settings.fold, hint=own.hint,
            alpha_base=own.alpha_base, alpha_expert=own.alpha_expert))
    tasks = {arm.base.task for arm in made}
    if len(tasks) > 1:
        told = ", ".join(f"{arm.name} {arm.base.task}" for arm in made)
        raise UserError(f"the adapters are on models of different tasks ({told}); evaluate them apart")
    return made


def _task(index: CacheIndex | None) -> Task | None:
    """What the cache was made for: it decides which `tiny` is meant."""
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


def _videos(
    settings: EvaluateSettings, arms: Sequence[Arm], taxonomy: Taxonomy, device: torch.device
) -> dict[str, Any]:
    """Clips, sampling and scorers; the first request of every arm is checked."""
    own, spec = settings.videos, arms[0].base.spec
    assert own.clips is not None
    clips = read_eval_clips(own.clips, taxonomy, None if settings.split == "all" else settings.split, own.count)
    shape = VideoShape(own.num_frames or spec.defaults.num_frames, own.size or spec.defaults.size, spec.defaults.fps)
    negative = OFFICIAL_NEGATIVE_PROMPT if own.negative_prompt is None else own.negative_prompt
    sampling = Sampling(
        shape, own.steps or spec.defaults.steps, complete_guidance(spec, own.guidance), own.seeds, settings.seed,
        own.batch_size, negative, own.flow_shift, own.sampler, own.guidance_interval)
    check_frames(shape.frames, spec.temporal_stride)
    check_size(*shape.size, spec.pixel_multiple)
    for arm in arms:
        request_for(arm.base.spec, arm, clips[0], sampling, 0)
    if spec.task == "i2v":
        for clip in clips:
            clip.first_frame(shape)  # read now, kept: one that cannot be read is found before the work
    check_rewards(own.rewards or ())
    loaders = {one.label: partial(_reward, one, device) for one in own.rewards or ()}
    scorers = make_scorers(own.metrics, clips, spec.task, shape, loaders, device)
    bounded = [s for s in scorers if isinstance(s, _BOUNDED) and own.ceiling]
    if any(clip.lacking(shape) for clip in clips):
        bounded = []
    return {"clips": clips, "sampling": sampling, "scorers": scorers, "bounded": bounded}


def _reward(one: RewardSettings, device: torch.device) -> Reward:
    return build_rewards((one,), device, {"tiny": make_tiny_reward})[one.label]


def _reward_identity(one: RewardSettings) -> str:
    """Its settings with size and time of its files: scores of other weights are not those of a finished video."""
    said = one.model_dump(mode="json", exclude={"weight"})
    place = getattr(one, "path", None)  # the tiny one has none
    found = sorted(place.iterdir()) if place is not None and place.is_dir() else [place] if place is not None else []
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found if path.is_file()]
    return json.dumps([said, facts], sort_keys=True)


def _captions(
    settings: EvaluateSettings, taxonomy: Taxonomy, clips: Sequence[EvalClip], items: Sequence[CachedItem]
) -> dict[str, Sequence[EvalClip]]:
    """Captions for the router: a file of their own, else those of the clips, else those of the cache."""
    own, split = settings.routing, None if settings.split == "all" else settings.split
    cached = [clip_of(item, len(taxonomy.families)) for item in items]
    found: dict[str, Sequence[EvalClip]] = {}
    if own.captions is not None:
        found["captions"] = read_eval_clips(own.captions, taxonomy, split)
    elif clips or any(clip.weights for clip in cached):
        found["captions"] = clips or [clip for clip in cached if clip.weights]
    if own.paraphrases is not None:
        found["paraphrases"] = read_eval_clips(own.paraphrases, taxonomy, split)
    for name, captions in found.items():
        if all(clip.fallback for clip in captions):
            raise UserError(f"none of the {len(captions)} {name} has a label or names an instrument of taxonomy "
                            f"{taxonomy.name}; give them \"instrument_label\"")
    return found


def _is_tiny(spec: ModelSpec) -> bool:
    return vae_identity(spec) == vae_identity(read_spec(tiny_folder("i2v" if spec.task == "i2v" else "t2v")))


def _plan(settings: EvaluateSettings, study: Study) -> list[str]:
    spec = study.arms[0].base.spec
    lines = [f"{len(study.arms)} adapters on {spec.path} ({spec.task}): {', '.join(arm.name for arm in study.arms)}"]
    if study.index is not None:
        plan = study.flow
        lines.append(f"losses: {len(study.items)} clips of {study.index.folder}, {plan.bins} bins of sigma x "
                     f"{plan.draws} draws for each noise expert, the same for every adapter")
    if study.sampling is not None:
        s, count = study.sampling, len(study.clips) * study.sampling.seeds
        lines.append(f"videos: {len(study.clips)} clips x {s.seeds} seeds = {count} an adapter, {s.batch_size} at a "
                     f"time, {s.shape.frames} frames {s.shape.size[0]}x{s.shape.size[1]}, {s.steps} steps")
        lines.append(f"metrics: {', '.join(names_of(study.scorers)) or 'none'}")
    for name, captions in study.captions.items():
        lines.append(f"routing: {len(captions)} {name}")
    return lines


def _write(settings: EvaluateSettings, study: Study, found: Findings, store: VideoStore) -> dict[str, Any]:
    out = settings.output
    interval = Interval(settings.interval.samples, settings.interval.level, settings.seed)
    said = document(study, found, interval)
    if study.clips and settings.videos.sheet:
        _save(side_by_side_sheet(study, store, settings.videos.sheet), out / "sheet.png")
        for arm in study.arms:
            sheet = arm_sheet(study, store, arm.name, settings.videos.sheet)
            _save(sheet, out / f"sheet_{store.folder_of(arm).name}.png")
    _save(picture(study, found, interval), out / "evaluation.png")
    files.write_text(out / JSON_FILE, json.dumps(said, ensure_ascii=False, indent=1) + "\n")
    for table in tables(study, found, interval):
        console.results.print(table)
    console.results.print(str(out / JSON_FILE), markup=False)
    return said


def _save(image: Image.Image, path: Path) -> None:
    with files.atomic_file(path) as temporary:
        image.save(temporary, format="PNG")
