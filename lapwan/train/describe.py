"""The plan of a run in lines: what is trained, on what, how sigma falls, which lr to expect."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from lapwan.errors import UserError
from lapwan.lora.formats import LoraFile
from lapwan.losses.sigmas import share_of_band, shares_of_bins, shift_for_tokens
from lapwan.names import NoiseExpert
from lapwan.settings.train import ExpertSettings, TrainSettings
from lapwan.train.build import RunData, sigma_rule, targets_of
from lapwan.train.optimisers import check_optimiser, describe_optimiser, ratio_line
from lapwan.wan.base import Base

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
    for expert, own in data.experts.items():
        check_optimiser(own.optimiser, own.schedule)
        file = (continued or {}).get(expert)
        ranks = targets_of(own.targets, base.num_layers) if file is None else {
            path: module.rank for path, module in file.modules.items()}
        count = data.schedule.count(expert)
        extras = [f"{count} steps", f"{len(ranks)} modules of ranks {', '.join(map(str, sorted(set(ranks.values()))))}",
                  describe_optimiser(own.optimiser, own.schedule)]
        if file is not None:
            extras.append(f"going on from {file.path}")
        if own.alpha_schedule.phases:
            extras.append("alpha " + ", ".join(f"{p.alpha:g} ({p.name})" for p in own.alpha_schedule.phases))
        if settings.ema_decay is not None:
            extras.append(f"running mean {settings.ema_decay:g}")
        lines.append(f"{expert.value} noise: " + "; ".join(extras))
        lines += histogram_lines(own, base, data, expert)
    if len(data.experts) == 2:
        lines.append(ratio_line(*(data.experts[e].optimiser for e in (NoiseExpert.HIGH, NoiseExpert.LOW))))
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


def histogram_lines(own: ExpertSettings, base: Base, data: RunData, expert: NoiseExpert) -> list[str]:
    """How sigma falls within the band, exactly, for clips of the first bucket."""
    rule = sigma_rule(own, base.bands[expert])
    _, height, width = min(data.items, key=lambda item: item.bucket).bucket
    tokens = (height // base.spec.spatial_stride) * (width // base.spec.spatial_stride) // 4
    sampler, band = rule.sampler.for_tokens(tokens), rule.band
    share = share_of_band(sampler, band.low, band.high)
    if share <= 0:
        raise UserError(f"the sigma sampler never draws inside the {expert.value} noise expert's band {band}; "
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
    shares = shares_of_bins(sampler, band.low, band.high, _BINS)
    step = (band.high - band.low) / _BINS
    bars = [f"    {band.low + i * step:.3f}-{band.low + (i + 1) * step:.3f} {100 * part:5.1f} % "
            + "#" * round(_WIDTH * part / max(shares)) for i, part in enumerate(shares)]
    return [text, *bars]
