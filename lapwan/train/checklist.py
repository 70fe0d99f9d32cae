"""What is printed before a run: the lines of its plan, and a checklist of data and settings.

`plan_lines` says what is trained, on what, how sigma is distributed, and which lr to expect. `checklist` checks the
clips (captions, motion, fps, length), the bands, and the settings against a health preset.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lapwan.caching.index import CachedItem
from lapwan.caching.read import read_item
from lapwan.diagnostics.tables import format_number
from lapwan.diagnostics.verdict import PRESETS, Evidence, judge
from lapwan.errors import UserError
from lapwan.lora.formats import AdapterFile
from lapwan.losses.sigmas import band_probability, bin_probabilities, shift_for_tokens
from lapwan.models.base import Base, target_ranks
from lapwan.names import Band, NoiseExpert
from lapwan.settings.train import NoiseExpertSettings, TrainSettings
from lapwan.train.optimizers import check_optimizer, describe_optimizer, ratio_line
from lapwan.train.recipe import RunData, sigma_rule

_BINS, _WIDTH = 10, 30  # of the histogram: rows, characters of the longest bar


def plan_lines(
    settings: TrainSettings, base: Base, data: RunData, continued: Mapping[NoiseExpert, AdapterFile] | None = None
) -> list[str]:
    """The lines of the plan that `--dry-run` and the start of a run print.

    Args:
        continued: the LoRAs that training starts from.

    Raises:
        UserError: settings that cannot work with this model.
    """
    clips = len({item.id for item in data.items})
    buckets = sorted({item.bucket for item in data.items})
    shapes = ", ".join(f"{f} frames {h}x{w}" for f, h, w in buckets[:4]) + (", ..." if len(buckets) > 4 else "")
    lines = [f"model {base.spec.path} ({base.task}), {clips} clips in {data.index.folder}: {shapes}",
             f"a step is {settings.accumulate} x {settings.batch_size} clips; {turns_line(data)}"]
    if settings.roi_weight:
        lines.append(region_line(settings, data))
    for noise_expert, local_settings in data.noise_experts.items():
        check_optimizer(local_settings.optimizer, local_settings.schedule)
        file = (continued or {}).get(noise_expert)
        ranks = target_ranks(local_settings.targets, base.num_layers) if file is None else file.ranks("init_lora")
        count = data.schedule.count(noise_expert)
        extras = [f"{count} steps", f"{len(ranks)} modules of ranks {', '.join(map(str, sorted(set(ranks.values()))))}",
                  describe_optimizer(local_settings.optimizer, local_settings.schedule)]
        if file is not None:
            extras.append(f"starting from {file.path}")
        if phases := local_settings.alpha_schedule.phases:
            extras.append("alpha " + ", ".join(f"{phase.alpha:g} ({phase.name})" for phase in phases))
        if settings.ema_decay is not None:
            extras.append(f"EMA decay {settings.ema_decay:g}")
        lines.append(f"{noise_expert.value} noise: " + "; ".join(extras))
        lines += histogram_lines(local_settings, base, data, noise_expert)
    trained = [data.noise_experts[e].optimizer for e in NoiseExpert if e in data.noise_experts]
    return lines + [ratio_line(*pair) for pair in pairwise(trained)]


def region_line(settings: TrainSettings, data: RunData) -> str:
    """How many clips the region loss acts on, and whether it is off."""
    with_region, total = sum(item.roi is not None for item in data.items), len(data.items)
    text = f"region loss weight {settings.roi_weight:g}: {with_region} of {total} clips have a region"
    if with_region < total and settings.roi_fallback == "motion":
        return f"{text}, the others use their moving parts (roi_fallback = \"motion\")"
    return text if with_region else f"{text}, so it is off; roi_fallback = \"motion\" would use their moving parts"


def turns_line(data: RunData) -> str:
    """The schedule in turns: `high 10, low 10, ... (200 turns)`."""
    schedule = data.schedule
    starts = [0, *(i for i in range(1, len(schedule)) if schedule[i] is not schedule[i - 1]), len(schedule)]
    turns = [f"{schedule[a].value} {b - a}" for a, b in pairwise(starts)]
    rest = f", ... ({len(turns)} turns)" if len(turns) > 4 else ""
    return f"turns: {', '.join(turns[:4])}{rest}"


def histogram_lines(
    settings: NoiseExpertSettings, base: Base, data: RunData, noise_expert: NoiseExpert
) -> list[str]:
    """The exact distribution of sigma within the band, for clips of the smallest bucket."""
    rule = sigma_rule(settings, base.bands[noise_expert])
    _, height, width = min(data.items, key=lambda item: item.bucket).bucket
    tokens = (height // base.spec.pixel_multiple) * (width // base.spec.pixel_multiple)
    sampler, band = rule.sampler.for_tokens(tokens), rule.band
    share = band_probability(sampler, band.low, band.high)
    if share <= 0:
        raise UserError(f"the sigma sampler never draws inside the {noise_expert.value} noise expert's band {band}; "
                        "change [sigma]")
    text = f"  sigma: {settings.sigma.sampler}"
    if settings.sigma.shift == "resolution":
        text += f", shift {shift_for_tokens(tokens):.2f} by size ({height}x{width})"
    elif settings.sigma.shift != 1.0:
        text += f", shift {settings.sigma.shift:g}"
    if settings.sigma.band == "truncate":
        text += f", truncated to {band}, which holds {100 * share:.1f} % of the whole distribution"
    else:
        text += f", squeezed into {band}"
    if settings.sigma.strata > 1:
        text += f", stratified by {settings.sigma.strata}"
    if settings.weighting.kind != "none":
        text += f"; loss weighted by {settings.weighting.kind}"
    shares = bin_probabilities(sampler, band.low, band.high, _BINS)
    step = (band.high - band.low) / _BINS
    bars = [f"    {band.low + i * step:.3f}-{band.low + (i + 1) * step:.3f} {100 * part:5.1f} % "
            + "#" * round(_WIDTH * part / max(shares)) for i, part in enumerate(shares)]
    return [text, *bars]


_READ = 64  # clips whose latents are read, at most
_STATIC = 1e-3  # change between latent frames over the standard deviation of the clip, below which nothing moves
_MOTION = re.compile(
    r"\b(mov|walk|run|turn|rotat|spin|swing|slid|pull|push|lift|grasp|cut|dissect|retract|tear|tilt|pan|zoom|fall|jump|"
    r"danc|wav|shak|open|clos|enter|leav|advanc|approach|withdraw|sweep|circl|rock|bounc|fly|swim|rise|rais|lower|drag|"
    r"squeez|press|suction|aspirat|irrigat|coagulat|cauteri[sz]|sutur|peel|snip|bit|poke|probe|stir|roll|drop|throw|"
    r"catch|reach|bend|stretch|twist|orbit|glid|drift|flow)\w*|"
    r"[移动走跑转旋摆滑拉推提抓夹剪切割撕分离倾摇落跳舞挥开合进入退出靠近接触扫绕升降拖压吸引冲洗凝缝剥探搅滚扔弯伸扭牵]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ChecklistItem:
    """A line of the checklist, and whether it is as it should be."""

    ok: bool
    text: str

    def __str__(self) -> str:
        return f"check {'ok  ' if self.ok else 'warn'} {self.text}"


def checklist(settings: TrainSettings, base: Base, data: RunData) -> list[ChecklistItem]:
    """All items; reading the latents of up to 64 clips is the slowest part."""
    clips = list({item.id: item for item in data.items}.values())
    return [
        _captions(settings, clips), *_frames(data, clips), _rate(base, data, clips), _lengths(clips, data.index.fps),
        *_preset(settings, data), _sampling(base, data), _bands(base.bands), _intervals(settings, data),
    ]


def _captions(settings: TrainSettings, clips: Sequence[CachedItem]) -> ChecklistItem:
    without = [clip for clip in clips if not _MOTION.search(clip.caption)]
    text = f"captions: {len(clips) - len(without)} of {len(clips)} name a motion"
    missing = bool(without) and settings.health.preset == "motion"
    if missing:
        text += (f"; a motion LoRA learns what captions name; one without is '{without[0].caption[:40]}' "
                 f"({without[0].id})")
    return ChecklistItem(not missing, text)


def _frames(data: RunData, clips: Sequence[CachedItem]) -> list[ChecklistItem]:
    """Non-finite or static clips, from the cached latents.

    Raises:
        UserError: clips that cannot be read; the run would fail at the first of them.
    """
    step = max(1, -(-len(clips) // _READ))
    chosen = clips[::step]
    non_finite, static, partly = [], [], []
    unreadable: list[tuple[str, UserError]] = []
    for clip in chosen:
        try:
            latents = read_item(data.index.folder, clip)["latents"]
        except UserError as error:
            unreadable.append((clip.id, error))
            continue
        assert latents is not None
        if not bool(latents.isfinite().all()):
            non_finite.append(clip.id)
            continue
        if latents.shape[1] < 2:
            continue
        change = (latents[:, 1:] - latents[:, :-1]).abs().mean(dim=(0, 2, 3)) / latents.std().clamp_min(1e-6)
        count = int((change < _STATIC).sum())
        if count == len(change):
            static.append(clip.id)
        elif count:
            partly.append(clip.id)
    if unreadable:
        names = ", ".join(name for name, _ in unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
        raise UserError(f"{len(unreadable)} of the {len(chosen)} clips that were checked cannot be read: {names}; "
                        f"cache them again; the first: {unreadable[0][1]}")
    text = (f"frames: {len(chosen)} of {len(clips)} clips read, {len(non_finite)} with non-finite latents, "
            f"{len(static)} that do not move, {len(partly)} with repeated frames")
    examples = (non_finite + static + partly)[:3]
    return [ChecklistItem(not examples, text + (f": {', '.join(examples)}" if examples else ""))]


def _rate(base: Base, data: RunData, clips: Sequence[CachedItem]) -> ChecklistItem:
    model_fps, cached_fps = base.spec.defaults.fps, data.index.fps
    rates = sorted({round(float(clip.facts["fps"]), 2) for clip in clips if clip.facts and clip.facts.get("fps")})
    shown_rates = ", ".join(f"{rate:g}" for rate in rates[:5]) + (" ..." if len(rates) > 5 else "")
    sources = f", sources at {shown_rates}" if rates else ""
    if cached_fps is None:
        return ChecklistItem(True, f"fps: not recorded in the cache; the model is for {model_fps}{sources}")
    slow = [rate for rate in rates if rate < cached_fps * 0.95]
    text = f"fps: cached at {cached_fps:g}, the model is for {model_fps}{sources}"
    if slow:
        text += f"; sources below {cached_fps:g} repeat frames"
    return ChecklistItem(abs(cached_fps - model_fps) < 0.5 and not slow, text)


def _lengths(clips: Sequence[CachedItem], fps: float | None) -> ChecklistItem:
    frames = sorted({clip.frames for clip in clips})
    seconds = f" ({frames[0] / fps:.2f} to {frames[-1] / fps:.2f} s)" if fps else ""
    short = [n for n in frames if 1 < n < 17]
    text = f"length: {', '.join(map(str, frames[:6]))} frames{seconds}"
    if 1 in frames and len(frames) > 1:
        text += "; some clips are still images"
    return ChecklistItem(not short, text + ("; below 17 frames there is little motion to learn" if short else ""))


def _preset(settings: TrainSettings, data: RunData) -> list[ChecklistItem]:
    """LR ratio and number of steps, by the health rules of inspect-weights."""
    predicted = {e.value: local_settings.optimizer.predicted_lr() for e, local_settings in data.noise_experts.items()}
    rates = {name: lr for name, lr in predicted.items() if lr is not None}
    if settings.health.preset is None:
        return [ChecklistItem(True, f"{len(data.schedule)} steps; no health.preset: LR ratio and steps are not judged")]
    verdict = judge(Evidence(PRESETS[settings.health.preset], {}, rates, [], len(data.schedule)))
    rules = [rule for rule in verdict["rules"] if rule["rule"].startswith(("LR", "steps"))]
    items = []
    for rule in rules:
        value = rule["value"]
        low = PRESETS[settings.health.preset].steps[0]
        ok = rule["status"] == "good" and not (rule["rule"].startswith("steps") and value < low)
        items.append(ChecklistItem(ok, f"{rule['rule']}: {format_number(value)} (wanted for {settings.health.preset}: "
                                       f"{rule['threshold']}; {rule['source']})"))
    return items


def _sampling(base: Base, data: RunData) -> ChecklistItem:
    spec = base.spec
    shifts = {e.value: settings.sigma.shift for e, settings in data.noise_experts.items()}
    trained = ", ".join(f"{name} {shift if isinstance(shift, str) else f'{shift:g}'}" for name, shift in shifts.items())
    return ChecklistItem(True, f"model: {spec.task}, boundary {spec.boundary_text}, samples with shift "
                               f"{spec.flow_shift:g}; trained with shift {trained}")


def _bands(bands: Mapping[NoiseExpert, Band]) -> ChecklistItem:
    if len(bands) < 2:
        return ChecklistItem(True, "bands: one transformer for all sigmas")
    text = "bands: " + ", ".join(f"{noise_expert} {bands[noise_expert]}" for noise_expert in bands)
    pairs = list(pairwise(bands.values()))  # from the highest noise on
    if any(upper.low < lower.low for upper, lower in pairs):
        return ChecklistItem(False, text + "; they are inverted: the high-noise expert must have the larger sigmas")
    if any(upper.low < lower.high for upper, lower in pairs):
        return ChecklistItem(False, text + "; they overlap: the noise experts would share sigmas")
    return ChecklistItem(True, text + ": no overlap")


def _intervals(settings: TrainSettings, data: RunData) -> ChecklistItem:
    total = len(data.schedule)
    parts = [f"saves every {settings.save_every} ({-(-total // settings.save_every)} checkpoints)"]
    for name, every in (("validates", settings.validation.every), ("previews", settings.preview.every)):
        parts.append(f"{name} every {every}" if every else f"never {name}")
    text = f"{total} steps: {', '.join(parts)}"
    if settings.health.preset is not None:
        text += f" (one run's experience, for {settings.health.preset}: save and validate every 100)"
    long = total >= 10
    rare = long and settings.save_every > total / 2
    late = long and settings.preview.every is not None and settings.preview.every > total / 2
    no_previews = long and settings.health.preset == "motion" and settings.preview.every is None
    if no_previews:
        text += "; without previews you cannot see whether motion gets weaker"
    if rare:
        text += f"; save_every = {settings.save_every} leaves no checkpoint to go back to"
    if late:
        text += f"; preview.every = {settings.preview.every} gives very few previews"
    return ChecklistItem(not (rare or late or no_previews), text)
