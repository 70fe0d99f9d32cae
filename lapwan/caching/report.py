"""The report of `lapwan cache`: the rows of a plan, and lapwan_report.json."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence

from lapwan import files
from lapwan.caching.index import CachedItem
from lapwan.caching.plan import CachePlan, PlannedItem
from lapwan.caching.stale import MISSING
from lapwan.console import PlanRow, count_text, duration_text
from lapwan.data.dropped_clips import DroppedClip

REPORT_FILE = "lapwan_report.json"


_SHOWN_SIZES, _SHOWN_DROPS, _SHOWN_REASONS = 6, 8, 8


def plan_rows(plan: CachePlan, pixels_per_second: float | None = None) -> list[PlanRow]:
    """The plan: items, what will be encoded and why, time and disk, which clips are dropped and why.

    Args:
        pixels_per_second: the speed of the last run into this folder, for the estimate.
    """
    clips = len({item.stem for item in plan.items})
    items = count_text(clips, "clip") if clips == len(plan.items) else (
        f"{count_text(len(plan.items), 'item')} of {count_text(clips, 'clip')}")
    sizes = Counter((len(item.indices), *reversed(item.crop.bucket)) for item in plan.items)
    shown = sorted(sizes.items())[:_SHOWN_SIZES]
    rows = [PlanRow("cache", f"{plan.folder}: {items} from {plan.cache.dataset}"),
            PlanRow("sizes", "none" if not sizes else ", ".join(f"{count} x {frames} frames {height}x{width}"
                                       for (frames, height, width), count in shown)
                    + (f" and {len(sizes) - len(shown)} more sizes" if len(sizes) > len(shown) else "")),
            *_pixel_rows(plan), *_todo_rows(plan)]
    rows[1:1] = [PlanRow("dataset", note) for note in plan.cache.notes]
    if plan.latents_todo:
        free = _free_bytes(plan)
        rows.append(PlanRow("disk", f"{size_text(plan.latents_bytes())} for latents, {size_text(free)} free"))
        if plan.latents_bytes() > free:
            rows.append(PlanRow("warning", "not enough free disk space", warning=True))
        if pixels_per_second:
            rows.append(PlanRow("time", f"about {duration_text(plan.pixels() / pixels_per_second)} for latents, at the "
                                        "speed of the last run"))
    if plan.unverified:
        rows.append(PlanRow("unverified", f"{count_text(len(plan.unverified), 'file')} made by another tool, used as "
                                          "they are"))
    if plan.superseded:
        rows.append(PlanRow("replaced", f"{count_text(len(plan.superseded), 'file')} of the same windows in another "
                                        "size, removed when the new ones are there"))
    if plan.foreign:
        rows.append(PlanRow("others", f"{count_text(len(plan.foreign), 'cache file')} of another tool that no clip "
                                      "uses, kept"))
    if plan.orphans:
        rows.append(PlanRow("orphans", f"{count_text(len(plan.orphans), 'cache file')} of no clip of the dataset, kept "
                                       "(--prune deletes them)"))
    rows += [PlanRow("dropped", f"{drop.name}: {drop.reason}", detail=number >= _SHOWN_DROPS)
             for number, drop in enumerate(plan.drops)]
    if len(plan.drops) > _SHOWN_DROPS:
        rows.append(PlanRow("dropped", f"{len(plan.drops)} clips in all; -v lists them"))
    return rows


_TREATMENTS = {
    "yadif": "interlaced: fields to whole frames (yadif)", "square pixels": "anamorphic: to square pixels",
    "mirrored": "mirrored by their display matrix", "16 bits scaled": "of more than 8 bits: scaled",
    "alpha over black": "transparent: over black", "alpha over white": "transparent: over white",
    "PQ tone-mapped": "HDR (PQ): tone-mapped to BT.709", "HLG tone-mapped": "HDR (HLG): tone-mapped to BT.709",
}


def _pixel_rows(plan: CachePlan) -> list[PlanRow]:
    """What is done to the pixels of clips beyond decoding, and folders of frames that lack some."""
    clips = {item.stem: item for item in plan.items}
    steps = Counter(step for item in clips.values() for step in item.facts.treatment.split(",") if step)
    texts = [f"{count_text(count, 'clip')} {_TREATMENTS[step]}" for step, count in sorted(steps.items())]
    refused = sum(drop.reason.startswith("HDR") for drop in plan.drops)
    texts += [f"{count_text(refused, 'clip')} HDR: refused (hdr = \"tonemap\" reads them)"] if refused else []
    gaps = [f"{item.clip.name}: frames missing ({trait})" for item in clips.values()
            for trait in (item.facts.traits or "").split(",") if "missing" in trait]
    texts += [*gaps[:_SHOWN_DROPS], *([f"{len(gaps)} folders with missing frames in all"] if len(gaps) > _SHOWN_DROPS
                                      else [])]
    return [PlanRow("" if number else "pixels", text) for number, text in enumerate(texts)]


def _todo_rows(plan: CachePlan) -> list[PlanRow]:
    """What will be encoded, by reason: `missing: 8 latents, 8 captions`."""
    by_reason: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for noun, todo in (("latent", plan.latents_todo), ("caption", plan.text_todo), ("region", plan.roi_todo)):
        for reason, count in _reasons(todo):
            by_reason.setdefault(reason, []).append(count_text(count, noun))
            counts[reason] += count
    if plan.prompts_todo:
        by_reason.setdefault(plan.prompts_todo, []).append("the empty and the negative prompt")
    shown = sorted(by_reason, key=lambda reason: (reason != MISSING, -counts[reason]))[:_SHOWN_REASONS]
    texts = [f"{', '.join(by_reason[reason])} ({reason})" for reason in shown]
    if rest := [reason for reason in by_reason if reason not in shown]:
        texts.append(f"{count_text(sum(counts[reason] for reason in rest), 'file')} for {len(rest)} other reasons")
    return [PlanRow("" if number else "to encode", text) for number, text in enumerate(texts or ["nothing"])]


def write_report(plan: CachePlan, items: Sequence[CachedItem], drops: Sequence[DroppedClip]) -> None:
    """Write `lapwan_report.json`: the clips that the last run dropped and why, unverified files and orphans."""
    report = {
        "dataset": str(plan.cache.dataset.absolute()), "items": len(items),
        "dropped": [{"clip": drop.name, "reason": drop.reason} for drop in drops],
        "unverified": plan.unverified, "orphans": plan.orphans,
    }
    text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    path = plan.folder / REPORT_FILE
    if not path.is_file() or path.read_bytes() != text.encode():
        files.write_text(path, text)


def _reasons(todo: Mapping[str, tuple[PlannedItem, str]]) -> list[tuple[str, int]]:
    """Reasons with their counts, missing files first."""
    counts = Counter(reason for _, reason in todo.values())
    return sorted(counts.items(), key=lambda pair: (pair[0] != MISSING, pair[0]))


def _free_bytes(plan: CachePlan) -> int:
    return shutil.disk_usage(files.nearest_folder(plan.folder)).free


def size_text(size: float) -> str:
    """Bytes in a readable unit: B to TiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
