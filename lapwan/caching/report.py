"""The report of `lapwan cache`: the lines of a plan, and lapwan_report.json."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence

from lapwan import files
from lapwan.caching.index import CachedItem
from lapwan.caching.plan import CachePlan, PlannedItem
from lapwan.caching.stale import MISSING
from lapwan.data.dropped_clips import DroppedClip, dropped_lines

REPORT_FILE = "lapwan_report.json"


def plan_lines(plan: CachePlan, pixels_per_second: float | None = None) -> list[str]:
    """The plan in lines: items, what will be encoded and why, time and disk, which clips are dropped and why.

    Args:
        pixels_per_second: the speed of the last run into this folder, for the estimate.
    """
    clips = len({item.stem for item in plan.items})
    lines = [f"{plan.folder}: {len(plan.items)} items of {clips} clips from {plan.cache.dataset}"]
    sizes = Counter((len(item.indices), *reversed(item.crop.bucket)) for item in plan.items)
    for (frames, height, width), count in sorted(sizes.items()):
        lines.append(f"  {count} x {frames} frames of {height}x{width}")
    for what, todo in (("latents", plan.latents_todo), ("text", plan.text_todo), ("regions", plan.roi_todo)):
        lines += [f"  {what}: {count} to encode ({reason})" for reason, count in _reasons(todo)]
    if plan.prompts_todo:
        lines.append(f"  empty and negative prompt: to encode ({plan.prompts_todo})")
    if plan.latents_todo:
        free = _free_bytes(plan)
        lines.append(f"  disk for latents: {size_text(plan.latents_bytes())} of {size_text(free)} free")
        if plan.latents_bytes() > free:
            lines.append("  warning: not enough free disk space")
        if pixels_per_second:
            lines.append(f"  time for latents: about {duration_text(plan.pixels() / pixels_per_second)}, "
                         "at the speed of the last run")
    if plan.unverified:
        lines.append(f"  {len(plan.unverified)} files made by another tool are used unverified")
    if plan.orphans:
        lines.append(f"  {len(plan.orphans)} cache files belong to no clip of the dataset; they are kept "
                     "(--prune deletes them)")
    return lines + dropped_lines(plan.drops)


def write_report(plan: CachePlan, items: Sequence[CachedItem], drops: Sequence[DroppedClip]) -> None:
    """Write `lapwan_report.json`: the clips that the last run dropped and why, unverified files and orphans."""
    report = {
        "dataset": str(plan.cache.dataset.absolute()), "items": len(items),
        "dropped": [{"clip": drop.name, "reason": drop.reason} for drop in drops],
        "unverified": plan.unverified, "orphans": plan.orphans,
    }
    text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    path = plan.folder / REPORT_FILE
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        files.write_text(path, text)


def _reasons(todo: Mapping[str, tuple[PlannedItem, str]]) -> list[tuple[str, int]]:
    """Reasons with their counts, missing files first."""
    counts = Counter(reason for _, reason in todo.values())
    return sorted(counts.items(), key=lambda pair: (pair[0] != MISSING, pair[0]))


def _free_bytes(plan: CachePlan) -> int:
    return shutil.disk_usage(files.nearest_folder(plan.folder)).free


def duration_text(seconds: float) -> str:
    """Seconds in a readable unit: s, min or h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size_text(size: float) -> str:
    """Bytes in a readable unit: B to TiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
