"""The plan of a run in lines: what is trained, on what, how sigma falls, which lr to expect."""

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
from lapwan.lora.formats import LoraFile
from lapwan.losses.sigmas import band_probability, bin_probabilities, shift_for_tokens
from lapwan.models.base import Base, target_ranks
from lapwan.names import Band, NoiseExpert
from lapwan.settings.train import NoiseExpertSettings, TrainSettings
from lapwan.train.optimizers import check_optimizer, describe_optimizer, predicted_lr, ratio_line
from lapwan.train.recipe import RunData, sigma_rule

_BINS, _WIDTH = 10, 30  # of the histogram: rows, characters of the longest bar


def describe(
    settings: TrainSettings, base: Base, data: RunData, continued: Mapping[NoiseExpert, LoraFile] | None = None
) -> list[str]:
    """What `--dry-run` and the start of a run say; `continued` are the LoRAs that are trained on.

    Raises:
        UserError: settings that cannot work on this model.
    """
    clips = len({item.id for item in data.items})
    buckets = sorted({item.bucket for item in data.items})
    shapes = ", ".join(f"{f} frames {h}x{w}" for f, h, w in buckets[:4]) + (", ..." if len(buckets) > 4 else "")
    lines = [f"model {base.spec.path} ({base.task}), {clips} clips in {data.index.folder}: {shapes}",
             f"a step is {settings.accumulate} x {settings.batch_size} clips; {turns_line(data)}"]
    if settings.roi_weight:
        lines.append(region_line(settings, data))
    for noise_expert, own in data.noise_experts.items():
        check_optimizer(own.optimizer, own.schedule)
        file = (continued or {}).get(noise_expert)
        ranks = target_ranks(own.targets, base.num_layers) if file is None else {
            path: module.rank for path, module in file.modules.items()}
        count = data.schedule.count(noise_expert)
        extras = [f"{count} steps", f"{len(ranks)} modules of ranks {', '.join(map(str, sorted(set(ranks.values()))))}",
                  describe_optimizer(own.optimizer, own.schedule)]
        if file is not None:
            extras.append(f"going on from {file.path}")
        if own.alpha_schedule.phases:
            extras.append("alpha " + ", ".join(f"{p.alpha:g} ({p.name})" for p in own.alpha_schedule.phases))
        if settings.ema_decay is not None:
            extras.append(f"running mean {settings.ema_decay:g}")
        lines.append(f"{noise_expert.value} noise: " + "; ".join(extras))
        lines += histogram_lines(own, base, data, noise_expert)
    if len(data.noise_experts) == 2:
        lines.append(ratio_line(*(data.noise_experts[e].optimizer for e in (NoiseExpert.HIGH, NoiseExpert.LOW))))
    return lines


def region_line(settings: TrainSettings, data: RunData) -> str:
    """Where the region loss acts, and that it is off where nothing says a region."""
    have, every = sum(item.roi is not None for item in data.items), len(data.items)
    text = f"region loss weight {settings.roi_weight:g}: {have} of {every} clips have a region"
    if have < every and settings.roi_fallback == "motion":
        return f"{text}, the others take where they move (roi_fallback = \"motion\")"
    return text if have else f"{text}, so it is off; roi_fallback = \"motion\" would take where clips move"


def turns_line(data: RunData) -> str:
    """The schedule as stretches: `high 10, low 10, ... (200 turns)`."""
    schedule = data.schedule
    starts = [0, *(i for i in range(1, len(schedule)) if schedule[i] is not schedule[i - 1]), len(schedule)]
    turns = [f"{schedule[a].value} {b - a}" for a, b in pairwise(starts)]
    shown = ", ".join(turns[:4]) + (f", ... ({len(turns)} turns)" if len(turns) > 4 else "")
    return f"turns: {shown}"


def histogram_lines(own: NoiseExpertSettings, base: Base, data: RunData, noise_expert: NoiseExpert) -> list[str]:
    """How sigma falls within the band, exactly, for clips of the first bucket."""
    rule = sigma_rule(own, base.bands[noise_expert])
    _, height, width = min(data.items, key=lambda item: item.bucket).bucket
    tokens = (height // base.spec.spatial_stride) * (width // base.spec.spatial_stride) // 4
    sampler, band = rule.sampler.for_tokens(tokens), rule.band
    share = band_probability(sampler, band.low, band.high)
    if share <= 0:
        raise UserError(f"the sigma sampler never draws inside the {noise_expert.value} noise expert's band {band}; "
                        "change [sigma]")
    text = f"  sigma: {own.sigma.sampler}"
    if own.sigma.shift == "resolution":
        text += f", shift {shift_for_tokens(tokens):.2f} by size ({height}x{width})"
    elif own.sigma.shift != 1.0:
        text += f", shift {own.sigma.shift:g}"
    if own.sigma.band == "truncate":
        text += f", truncated to {band}, which holds {100 * share:.1f} % of the whole distribution"
    else:
        text += f", squeezed into {band}"
    if own.sigma.strata > 1:
        text += f", stratified by {own.sigma.strata}"
    if own.weighting.kind != "none":
        text += f"; loss weighted by {own.weighting.kind}"
    shares = bin_probabilities(sampler, band.low, band.high, _BINS)
    step = (band.high - band.low) / _BINS
    bars = [f"    {band.low + i * step:.3f}-{band.low + (i + 1) * step:.3f} {100 * part:5.1f} % "
            + "#" * round(_WIDTH * part / max(shares)) for i, part in enumerate(shares)]
    return [text, *bars]

_READ = 64  # clips whose latents are read, at most
_STILL = 1e-3  # change between latent frames, over the clip's standard deviation: below it nothing moves
_MOTION = re.compile(
    r"\b(mov|walk|run|turn|rotat|spin|swing|slid|pull|push|lift|grasp|cut|dissect|retract|tear|tilt|pan|zoom|fall|jump|"
    r"danc|wav|shak|open|clos|enter|leav|advanc|approach|withdraw|sweep|circl|rock|bounc|fly|swim|rise|rais|lower|drag|"
    r"squeez|press|suction|aspirat|irrigat|coagulat|cauteri[sz]|sutur|peel|snip|bit|poke|probe|stir|roll|drop|throw|"
    r"catch|reach|bend|stretch|twist|orbit|glid|drift|flow)\w*|"
    r"[移动走跑转旋摆滑拉推提抓夹剪切割撕分离倾摇落跳舞挥开合进入退出靠近接触扫绕升降拖压吸引冲洗凝缝剥探搅滚扔弯伸扭牵]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Finding:
    """One line: whether it is as it should be, and what was found."""

    fine: bool
    text: str

    def __str__(self) -> str:
        return f"check {'ok  ' if self.fine else 'LOOK'} {self.text}"


def checklist(settings: TrainSettings, base: Base, data: RunData) -> list[Finding]:
    """All findings; reading latents of up to 64 clips is the slowest part."""
    clips = list({item.id: item for item in data.items}.values())
    return [
        _captions(settings, clips), *_frames(data, clips), _rate(base, data, clips), _lengths(clips, data.index.fps),
        *_preset(settings, data), _sampling(base, data), _bands(base.bands), _intervals(settings, data),
    ]


def _captions(settings: TrainSettings, clips: Sequence[CachedItem]) -> Finding:
    silent = [clip for clip in clips if not _MOTION.search(clip.caption)]
    named = len(clips) - len(silent)
    text = f"captions: {named} of {len(clips)} name a motion"
    wanted = settings.health.preset == "motion"
    if silent and wanted:
        text += f"; a motion LoRA learns what captions name; such as '{silent[0].caption[:40]}' ({silent[0].id})"
    return Finding(not (wanted and silent), text)


def _frames(data: RunData, clips: Sequence[CachedItem]) -> list[Finding]:
    """Non-finite or still clips, from the cached latents.

    Raises:
        UserError: clips that cannot be read: the run would end at the first of them.
    """
    step = max(1, -(-len(clips) // _READ))
    chosen = clips[::step]
    broken, still, partly = [], [], []
    unreadable: list[tuple[str, UserError]] = []
    for clip in chosen:
        try:
            latents = read_item(data.index.folder, clip)["latents"]
        except UserError as error:
            unreadable.append((clip.id, error))
            continue
        assert latents is not None
        if not bool(latents.isfinite().all()):
            broken.append(clip.id)
            continue
        if latents.shape[1] < 2:
            continue
        change = (latents[:, 1:] - latents[:, :-1]).abs().mean(dim=(0, 2, 3)) / latents.std().clamp_min(1e-6)
        count = int((change < _STILL).sum())
        if count == len(change):
            still.append(clip.id)
        elif count:
            partly.append(clip.id)
    if unreadable:
        names = ", ".join(name for name, _ in unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
        raise UserError(f"{len(unreadable)} of {len(chosen)} clips looked at cannot be read: {names}; cache them "
                        f"again; the first: {unreadable[0][1]}")
    text = (f"frames: {len(chosen)} of {len(clips)} clips read, {len(broken)} with non-finite latents, {len(still)} "
            f"that do not move, {len(partly)} with repeated frames")
    named = (broken + still + partly)[:3]
    return [Finding(not named, text + (f": {', '.join(named)}" if named else ""))]


def _rate(base: Base, data: RunData, clips: Sequence[CachedItem]) -> Finding:
    wanted, have = base.spec.defaults.fps, data.index.fps
    rates = sorted({round(float(clip.facts["fps"]), 2) for clip in clips if clip.facts and clip.facts.get("fps")})
    shown_rates = ", ".join(f"{rate:g}" for rate in rates[:5]) + (" ..." if len(rates) > 5 else "")
    sources = f", sources at {shown_rates}" if rates else ""
    if have is None:
        return Finding(True, f"fps: the cache does not say; the model is for {wanted}{sources}")
    slow = [rate for rate in rates if rate < have * 0.95]
    text = f"fps: cached at {have:g}, the model is for {wanted}{sources}"
    if slow:
        text += f"; sources below {have:g} repeat frames"
    return Finding(abs(have - wanted) < 0.5 and not slow, text)


def _lengths(clips: Sequence[CachedItem], fps: float | None) -> Finding:
    frames = sorted({clip.frames for clip in clips})
    seconds = f" ({frames[0] / fps:.2f} to {frames[-1] / fps:.2f} s)" if fps else ""
    short = [n for n in frames if 1 < n < 17]
    text = f"length: {', '.join(map(str, frames[:6]))} frames{seconds}"
    if 1 in frames and len(frames) > 1:
        text += "; stills among the clips"
    return Finding(not short, text + ("; below 17 frames there is little motion to learn" if short else ""))


def _preset(settings: TrainSettings, data: RunData) -> list[Finding]:
    """LR ratio and number of steps, by the rules of inspect-weights."""
    rates = {e.value: lr for e, own in data.noise_experts.items() if (lr := predicted_lr(own.optimizer)) is not None}
    if settings.health.preset is None:
        return [Finding(True, f"{len(data.schedule)} steps; no health.preset: LR ratio and steps are not judged")]
    verdict = judge(Evidence(PRESETS[settings.health.preset], {}, rates, [], len(data.schedule)))
    rules = [rule for rule in verdict["rules"] if rule["rule"].startswith(("LR", "steps"))]
    found = []
    for rule in rules:
        value = rule["value"]
        low = PRESETS[settings.health.preset].steps[0]
        fine = rule["status"] == "good" and not (rule["rule"].startswith("steps") and value < low)
        found.append(Finding(fine, f"{rule['rule']}: {format_number(value)} (wanted for {settings.health.preset}: "
                                   f"{rule['threshold']}; {rule['source']})"))
    return found


def _sampling(base: Base, data: RunData) -> Finding:
    spec = base.spec
    boundary = "none" if spec.boundary is None else f"{spec.boundary:g}"
    shifts = {e.value: own.sigma.shift for e, own in data.noise_experts.items()}
    trained = ", ".join(f"{name} {shift if isinstance(shift, str) else f'{shift:g}'}" for name, shift in shifts.items())
    return Finding(True, f"model: {spec.task}, boundary {boundary}, samples with shift {spec.flow_shift:g}; trained "
                         f"with shift {trained}")


def _bands(bands: Mapping[NoiseExpert, Band]) -> Finding:
    if len(bands) < 2:
        return Finding(True, "bands: one transformer for all sigmas")
    high, low = bands[NoiseExpert.HIGH], bands[NoiseExpert.LOW]
    text = f"bands: high {high}, low {low}"
    if high.low < low.low:
        return Finding(False, text + "; they are inverted: the high-noise expert must have the larger sigmas")
    if high.low < low.high:
        return Finding(False, text + "; they overlap: the noise experts would share sigmas")
    return Finding(True, text + ": apart")


def _intervals(settings: TrainSettings, data: RunData) -> Finding:
    total = len(data.schedule)
    parts = [f"saves every {settings.save_every} ({-(-total // settings.save_every)} checkpoints)"]
    for name, every in (("validates", settings.validation.every), ("previews", settings.preview.every)):
        parts.append(f"{name} every {every}" if every else f"never {name}")
    text = f"{total} steps: {', '.join(parts)}"
    if settings.health.preset is not None:
        text += f" (one run's experience, for {settings.health.preset}: save and look every 100)"
    long = total >= 10
    rare = long and settings.save_every > total / 2
    late = long and settings.preview.every is not None and settings.preview.every > total / 2
    blind = long and settings.health.preset == "motion" and settings.preview.every is None
    if blind:
        text += "; without previews nobody sees whether motion is being tamed"
    if rare:
        text += f"; save_every = {settings.save_every} leaves nothing to go back to"
    if late:
        text += f"; preview.every = {settings.preview.every} shows little of how it came about"
    return Finding(not (rare or late or blind), text)
