"""What is printed before a run: its plan, and a checklist of data and settings.

`plan_rows` says what is trained, on what, how sigma is distributed, and which lr to expect. `checklist` checks the
clips (captions, motion, fps, length), the bands, and the settings against a health preset.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from lapwan.caching.index import CachedItem
from lapwan.caching.read import read_item
from lapwan.console import PlanRow, count_text
from lapwan.diagnostics.tables import format_number
from lapwan.diagnostics.verdict import PRESETS, Evidence, judge
from lapwan.errors import UserError
from lapwan.lora.adapter_file import AdapterFile
from lapwan.losses.sigmas import band_probability, bin_probabilities, draw_in_band, shift_for_tokens
from lapwan.models.base import Base, target_ranks
from lapwan.names import Band, NoiseExpert
from lapwan.settings.sigma import SigmaSettings
from lapwan.settings.srpo import SrpoSettings
from lapwan.settings.train import NoiseExpertSettings, TrainSettings
from lapwan.train.metrics import check_tracker
from lapwan.train.optimizers import check_optimizer, describe_optimizer, ratio_line
from lapwan.train.recipe import RunData, first_frame_share, sigma_rule

_BINS, _WIDTH = 10, 30  # of the histogram: rows, characters of the longest bar
_EVEN = 1e-3  # difference between the shares of two bins, below which a distribution is uniform


def plan_rows(
    settings: TrainSettings, base: Base, data: RunData, continued: Mapping[NoiseExpert, AdapterFile] | None = None
) -> list[PlanRow]:
    """The plan that `--dry-run` and the start of a run print.

    Args:
        continued: the LoRAs that training starts from.

    Raises:
        UserError: settings that cannot work with this model.
    """
    clips = len({item.id for item in data.items})
    buckets = sorted({item.bucket for item in data.items})
    shapes = ", ".join(f"{f} frames {h}x{w}" for f, h, w in buckets[:4])
    if len(buckets) > 4:
        shapes += f" and {len(buckets) - 4} more sizes"
    check_tracker(settings.tracker)
    turns = "" if base.spec.one_transformer else f"; {turns_line(data)}"
    rows = [PlanRow("model", f"{base.spec.path} ({base.task})"),
            PlanRow("data", f"{count_text(clips, 'clip')} in {data.index.folder}: {shapes}"),
            PlanRow("steps", f"{len(data.schedule)}, each of {batch_text(settings, 'clip')}{turns}")]
    if base.spec.clean_first_frame:
        rows.append(PlanRow("first frame", first_frame_line(settings, base, data)))
    if settings.roi_weight:
        rows.append(PlanRow("regions", region_line(settings, data)))
    texts: dict[str, list[str]] = {}
    for noise_expert, local_settings in data.noise_experts.items():
        check_optimizer(local_settings.optimizer, local_settings.schedule)
        text = _trained_text(settings, local_settings, base, data, noise_expert, (continued or {}).get(noise_expert))
        texts.setdefault(text, []).append(noise_expert.value)
    rows += [PlanRow(_row_label(base, names), text if len(names) == 1 else f"each {text}")
             for text, names in texts.items()]
    rows += sigma_rows(base, data)
    trained = [data.noise_experts[e].optimizer for e in NoiseExpert if e in data.noise_experts]
    return rows + [PlanRow("lr", ratio_line(*pair)) for pair in pairwise(trained) if pair[0] != pair[1]]


def _row_label(base: Base, names: Sequence[str]) -> str:
    if base.spec.one_transformer:
        return "transformer"
    return f"{names[0]} noise" if len(names) == 1 else ", ".join(names)


def first_frame_line(settings: TrainSettings, base: Base, data: RunData) -> str:
    """How many draws have the clean first frame of their clip."""
    share = first_frame_share(settings, base.spec)
    text = f"given clean in {100 * share:g} % of the draws (image-to-video)"
    images = sum(item.frames == 1 for item in data.items)
    return f"{text}; never of the {count_text(images, 'image')}" if images and share else text


def batch_text(settings: TrainSettings | SrpoSettings, noun: str) -> str:
    """What an optimizer step is made of: `4 clips`, `2 x 4 clips (accumulate x batch_size)`."""
    text = count_text(settings.batch_size, noun)
    return text if settings.accumulate == 1 else f"{settings.accumulate} x {text} (accumulate x batch_size)"


def _trained_text(
    settings: TrainSettings, local_settings: NoiseExpertSettings, base: Base, data: RunData,
    noise_expert: NoiseExpert, file: AdapterFile | None,
) -> str:
    """Steps, modules and optimizer of a noise expert."""
    ranks = target_ranks(local_settings.targets, base.num_layers) if file is None else file.ranks("init_lora")
    extras = [f"{data.schedule.count(noise_expert)} steps",
              f"{len(ranks)} modules of rank {', '.join(map(str, sorted(set(ranks.values()))))}",
              describe_optimizer(local_settings.optimizer, local_settings.schedule)]
    if file is not None:
        extras.append(f"starting from {file.path}")
    if phases := local_settings.alpha_schedule.phases:
        extras.append("alpha " + ", ".join(f"{phase.alpha:g} ({phase.name})" for phase in phases))
    if settings.ema_decay is not None:
        extras.append(f"EMA decay {settings.ema_decay:g}")
    return "; ".join(extras)


def region_line(settings: TrainSettings, data: RunData) -> str:
    """How many clips the region loss acts on, and whether it is off."""
    with_region, total = sum(item.roi is not None for item in data.items), len(data.items)
    text = f"loss weight {settings.roi_weight:g}: {with_region} of {total} clips have a region"
    if with_region < total and settings.roi_fallback == "motion":
        return f"{text}, the others use their moving parts (roi_fallback = \"motion\")"
    return text if with_region else f"{text}, so it is off; roi_fallback = \"motion\" would use their moving parts"


def turns_line(data: RunData) -> str:
    """The schedule in turns: `turns: high 10, low 10, ... (200 turns)`."""
    schedule = data.schedule
    starts = [0, *(i for i in range(1, len(schedule)) if schedule[i] is not schedule[i - 1]), len(schedule)]
    turns = [f"{schedule[a].value} {b - a}" for a, b in pairwise(starts)]
    rest = f", ... ({len(turns)} turns)" if len(turns) > 4 else ""
    return f"turns: {', '.join(turns[:4])}{rest}"


def sigma_rows(base: Base, data: RunData) -> list[PlanRow]:
    """The exact distribution of sigma within each band, for clips of the smallest bucket.

    Uniform over the band, as it is by default, it is a detail; histograms always are.

    Raises:
        UserError: a sampler that never draws inside a band.
    """
    rows: list[PlanRow] = []
    for noise_expert, local_settings in data.noise_experts.items():
        rule = sigma_rule(local_settings, base.bands[noise_expert], base.spec.patch)
        _, height, width = min(data.items, key=lambda item: item.bucket).bucket
        tokens = (height // base.spec.pixel_multiple) * (width // base.spec.pixel_multiple)
        sampler, band = rule.sampler.for_tokens(tokens), rule.band
        share = band_probability(sampler, band.low, band.high)
        if share <= 0:
            raise UserError(f"the sigma sampler never draws inside the {base.spec.title_of(noise_expert)}'s band "
                            f"{band}; change [sigma]")
        shares = bin_probabilities(sampler, band.low, band.high, _BINS)
        even = max(shares) - min(shares) < _EVEN
        name = "" if base.spec.one_transformer else f"{noise_expert.value} "
        text = f"{name}{band}: {_sampler_text(local_settings, tokens, (height, width))}"
        if not even:
            lower, upper = draw_in_band(sampler, torch.tensor([0.25, 0.75]), band.low, band.high).tolist()
            text += f"; half of all draws in {lower:.3f} to {upper:.3f}"
        plain = even and local_settings.sigma == SigmaSettings() and local_settings.weighting.kind == "none"
        rows.append(PlanRow("" if rows and not plain else "sigma", text, detail=plain))
        if not even:
            step = (band.high - band.low) / _BINS
            whole = f"the band holds {100 * share:.1f} % of the whole distribution; of that by sigma:"
            rows.append(PlanRow("", "\n".join([*[whole] * (local_settings.sigma.band == "truncate"), *(
                f"{band.low + i * step:.3f}-{band.low + (i + 1) * step:.3f} {100 * part:5.1f} % "
                + "#" * round(_WIDTH * part / max(shares)) for i, part in enumerate(shares))]), detail=True))
    return rows


def _sampler_text(settings: NoiseExpertSettings, tokens: int, size: tuple[int, int]) -> str:
    """`logit_normal, shift 5`: what differs from the default, after the sampler's name."""
    sigma = settings.sigma
    text: str = sigma.sampler
    if sigma.shift == "resolution":
        text += f", shift {shift_for_tokens(tokens):.2f} by size ({size[0]}x{size[1]})"
    elif sigma.shift != 1.0:
        text += f", shift {sigma.shift:g}"
    if sigma.band == "squeeze":
        text += ", squeezed into the band"
    if sigma.strata > 1:
        text += f", stratified by {sigma.strata}"
    if settings.weighting.kind != "none":
        text += f", loss weighted by {settings.weighting.kind}"
    return text


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
        *_preset(settings, base, data), _sampling(base, data), _bands(base.bands), _intervals(settings, data),
    ]


def check_rows(items: Sequence[ChecklistItem]) -> list[PlanRow]:
    """A count of what is as it should be, and the warnings; with -v all items."""
    passed = [item for item in items if item.ok]
    return [PlanRow("checks", f"{len(passed)} of {len(items)} passed"),
            *(PlanRow("", str(item), detail=True) for item in passed),
            *(PlanRow("warning", item.text, warning=True) for item in items if not item.ok)]


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
    longest = f" to {frames[-1] / fps:.2f}" if fps and len(frames) > 1 else ""
    seconds = f" ({frames[0] / fps:.2f}{longest} s)" if fps else ""
    short = [n for n in frames if 1 < n < 17]
    text = f"length: {', '.join(map(str, frames[:6]))} frames{seconds}"
    if 1 in frames and len(frames) > 1:
        text += "; some clips are still images"
    return ChecklistItem(not short, text + ("; below 17 frames there is little motion to learn" if short else ""))


def _preset(settings: TrainSettings, base: Base, data: RunData) -> list[ChecklistItem]:
    """LR ratio and number of steps, by the health rules of inspect-weights."""
    predicted = {e.value: local_settings.optimizer.predicted_lr() for e, local_settings in data.noise_experts.items()}
    rates = {name: lr for name, lr in predicted.items() if lr is not None}
    if settings.health.preset is None:
        return [ChecklistItem(True, f"{len(data.schedule)} steps; no health.preset: LR ratio and steps are not judged")]
    if base.spec.one_transformer:
        return [ChecklistItem(True, f"{len(data.schedule)} steps; one transformer: LR ratio and steps are not judged")]
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
    texts = {name: shift if isinstance(shift, str) else f"{shift:g}" for name, shift in shifts.items()}
    trained = ", ".join(text if spec.one_transformer else f"{name} {text}" for name, text in texts.items())
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
    parts = [f"saves every {settings.save_every} ({count_text(-(-total // settings.save_every), 'checkpoint')})"]
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
