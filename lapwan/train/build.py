"""From settings to a run: targets, schedule, optimisers, the run folder, and the plan that --dry-run prints."""

from __future__ import annotations

import math
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapwan import console, files
from lapwan.data.cachefile import CachedItem, CacheIndex, load_index
from lapwan.errors import UserError
from lapwan.lora.attach import initial_state
from lapwan.lora.state import LoraState
from lapwan.lora.targets import TargetRule, resolve_targets
from lapwan.losses.sigmas import LogitNormal, Shifted, SigmaSampler, Uniform, share_of_band
from lapwan.names import NoiseExpert
from lapwan.settings.base import to_toml
from lapwan.settings.train import ExpertSettings, SigmaSettings, TargetSettings, TrainSettings
from lapwan.train.checkpoint import checkpoints
from lapwan.train.data import ClipStore, check_cache, training_items
from lapwan.train.metrics import METRICS_FILE
from lapwan.train.objective import Objective
from lapwan.train.optimisers import make_optimiser, make_schedule
from lapwan.train.order import SampleOrder
from lapwan.train.trainer import Plan, Track, Trainer
from lapwan.train.turns import interleave
from lapwan.wan.base import Base

SETTINGS_FILE = "settings.toml"
# What may differ between a run and its resumption: it changes no number that is trained.
_FREE_AT_RESUME = ("output", "resume", "save_every", "keep_last", "log_every", "device")


@dataclass(frozen=True)
class RunData:
    """The clips of a run, checked against the model, and each noise expert's own settings."""

    settings: TrainSettings
    index: CacheIndex
    items: list[CachedItem]
    experts: dict[NoiseExpert, ExpertSettings]

    def orders(self, weights: Sequence[float] | None = None) -> dict[NoiseExpert, SampleOrder]:
        """Each noise expert's order of visits."""
        s = self.settings
        buckets = [item.bucket for item in self.items]
        return {e: SampleOrder(buckets, s.batch_size, s.seed, e.value, weights) for e in self.experts}

    @property
    def schedule(self) -> list[NoiseExpert]:
        """The noise expert of every optimiser step."""
        return interleave({e: own.steps for e, own in self.experts.items()}, self.settings.turn)


def read_data(settings: TrainSettings, base: Base) -> RunData:
    """Read the cache's index and resolve each noise expert's settings; no weights are loaded.

    Raises:
        UserError: a cache that does not fit the model, or a noise expert the model does not have.
    """
    for expert in settings.experts:
        if expert not in base.spec.experts:
            have = [e.value for e in base.spec.experts]
            raise UserError(f"experts holds '{expert.value}', the model has {have}; set experts = {have}")
    index = load_index(settings.data.cache, settings.data.labels)
    items = training_items(index, settings.data.split)
    check_cache(index, base.spec, items)
    per_epoch = SampleOrder([i.bucket for i in items], settings.batch_size, settings.seed, "").batches_per_epoch
    steps = max(1, math.ceil((settings.epochs or 1) * per_epoch / settings.accumulate))
    return RunData(settings, index, items, {e: settings.of(e, steps) for e in settings.experts})


def targets_of(settings: TargetSettings, num_blocks: int) -> dict[str, int]:
    """Rank by module path.

    Raises:
        UserError: more blocks than the model has, or nothing to train.
    """
    attention = {
        f"{kind}.{part}": getattr(settings, part) for kind in settings.attention for part in ("q", "k", "v", "o")
    }
    # The default recipe counts blocks of a 40-block model; a smaller model simply has all of them trained.
    clip = {name: None if n is None else min(n, num_blocks) for name, n in
            (("attention", settings.last_blocks), ("ffn", settings.ffn_last_blocks))}
    rules = [
        TargetRule(clip["attention"], attention),
        TargetRule(clip["ffn"], {"ffn.0": settings.ffn_in, "ffn.2": settings.ffn_out}),
    ]
    return resolve_targets(rules, num_blocks)


def sampler_of(settings: SigmaSettings) -> SigmaSampler:
    """The sigma distribution before truncation to a band."""
    inner: SigmaSampler = LogitNormal(settings.mean, settings.std) if settings.sampler == "logit_normal" else Uniform()
    return inner if settings.shift == 1.0 else Shifted(inner, settings.shift)


def fresh_lora(transformer: Any, own: ExpertSettings, seed: int, *key: str) -> LoraState:
    """A new LoRA on a noise expert's targets."""
    ranks = targets_of(own.targets, len(transformer.blocks))
    return initial_state(transformer, ranks, own.alpha, seed, *key)


def provenance(settings: TrainSettings, base: Base, data: RunData, expert: NoiseExpert) -> dict[str, str]:
    """What an adapter file says of its making."""
    band = base.bands[expert]
    return {
        "lapwan.noise_expert": expert.value,
        "lapwan.task": base.task,
        "lapwan.boundary": "" if base.spec.boundary is None else repr(base.spec.boundary),
        "lapwan.base_fingerprint": base.fingerprint(expert),
        "lapwan.clips": str(len({item.id for item in data.items})),
        "lapwan.seed": str(settings.seed),
        "modelspec.timestep_range": f"{1000 * band.low:g},{1000 * band.high:g}",
        "modelspec.title": f"{settings.name}_{expert.file_suffix}",
    }


def claim_run(settings: TrainSettings, overwrite: bool) -> None:
    """Check the run folder: new, or one to resume with the same settings.

    Raises:
        UserError: it exists and neither --resume nor --overwrite is given, or it was made with other settings.
    """
    run = settings.output
    if not settings.resume:
        if run.is_dir() and checkpoints(run) and not overwrite:
            raise UserError(f"output exists: {run} holds a run; pass --resume to go on with it, or --overwrite")
        files.claim_output(run, overwrite)
        return
    told = run / SETTINGS_FILE
    if not told.is_file():
        return
    before, now = tomllib.loads(told.read_text(encoding="utf-8")), tomllib.loads(to_toml(settings))
    changed = sorted(k for k in {*before, *now} - set(_FREE_AT_RESUME) if before.get(k) != now.get(k))
    if changed:
        shown = "; ".join(f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in changed)
        raise UserError(f"cannot resume {run} with other settings ({shown}); put them back, or start another run")


def start_folder(settings: TrainSettings, overwrite: bool) -> None:
    """Make the run folder and write the resolved settings into it; an older run is removed under --overwrite."""
    if overwrite and not settings.resume and settings.output.is_dir():
        _remove_run(settings.output)
    settings.output.mkdir(parents=True, exist_ok=True)
    told = settings.output / SETTINGS_FILE
    if not (settings.resume and told.is_file()):
        header = "The resolved settings of this run; `--config` with this file repeats it."
        files.write_text(told, to_toml(settings.model_copy(update={"resume": False}), header))


def _remove_run(run: Path) -> None:
    """Remove what a run writes and nothing else: the folder may hold the user's own files."""
    for _, folder in checkpoints(run):
        shutil.rmtree(folder)
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    (run / METRICS_FILE).unlink(missing_ok=True)


def make_trainer(
    settings: TrainSettings, base: Base, data: RunData, objective: Objective, store: ClipStore, command: str
) -> Trainer:
    """Wire tracks, optimisers and lr schedules around an objective."""
    steps = {e.value: own.steps for e, own in data.experts.items()}
    optimisers, schedules = {}, {}
    for name, groups in objective.optimised.items():
        # What both noise experts share is stepped in every turn, at the shared settings.
        own: ExpertSettings | TrainSettings = data.experts[NoiseExpert(name)] if name in steps else settings
        optimisers[name] = make_optimiser(own.optimiser, groups)
        schedules[name] = make_schedule(own.schedule, optimisers[name], steps.get(name, len(data.schedule)))
    tracks = {
        expert: Track(order, sampler_of(data.experts[expert].sigma), base.bands[expert])
        for expert, order in data.orders().items()
    }
    plan = Plan(
        run=settings.output, schedule=data.schedule, tracks=tracks, optimisers=optimisers, lr_schedules=schedules,
        load_batch=store.batch, item_ids=[item.id for item in data.items], seed=settings.seed,
        accumulate=settings.accumulate, max_grad_norm=settings.max_grad_norm,
        caption_dropout=settings.caption_dropout, save_every=settings.save_every, log_every=settings.log_every,
        keep_last=settings.keep_last, resume_command=f"{command} --resume",
    )
    return Trainer(plan, objective)


def run_training(trainer: Trainer, settings: TrainSettings) -> bool:
    """Resume if asked, then train to the end. False if there was nothing left to do."""
    if settings.resume:
        if trainer.resume():
            console.log(f"resuming {settings.output} at step {trainer.step} of {len(trainer.plan.schedule)}")
        else:
            console.log(f"{settings.output} has no checkpoint yet; starting at step 0")
    if trainer.step >= len(trainer.plan.schedule):
        console.log(f"{settings.output} is complete: {trainer.step} steps; nothing to do")
        return False
    trainer.fit()
    return True


def describe(settings: TrainSettings, base: Base, data: RunData) -> list[str]:
    """The plan in lines: what is trained, on what, and how sigma falls."""
    clips = len({item.id for item in data.items})
    buckets = sorted({item.bucket for item in data.items})
    shapes = ", ".join(f"{f} frames {h}x{w}" for f, h, w in buckets[:4]) + (", ..." if len(buckets) > 4 else "")
    lines = [f"model {base.spec.path} ({base.task}), {clips} clips in {data.index.folder}: {shapes}"]
    for expert, own in data.experts.items():
        band, sampler = base.bands[expert], sampler_of(own.sigma)
        ranks = targets_of(own.targets, base.num_layers)
        share = share_of_band(sampler, band.low, band.high)
        if share <= 0:
            raise UserError(f"the sigma sampler never draws inside the {expert.value} noise expert's band {band}; "
                            "change [sigma]")
        lines.append(
            f"{expert.value} noise: {own.steps} steps, sigma in {band} ({100 * share:.1f} % of the draws before "
            f"truncation), {len(ranks)} modules of ranks {sorted(set(ranks.values()))}, "
            f"{own.optimiser.type} lr {own.optimiser.lr:g}"
        )
    return lines


def metadata_of(settings: TrainSettings, base: Base, data: RunData) -> Mapping[NoiseExpert, dict[str, str]]:
    """`provenance` for every trained noise expert."""
    return {expert: provenance(settings, base, data, expert) for expert in data.experts}
