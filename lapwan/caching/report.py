"""What the user reads of a cache plan and of what came of it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence

from lapwan import files
from lapwan.caching.index import CachedItem
from lapwan.caching.plan import CachePlan, Wanted
from lapwan.caching.stale import MISSING
from lapwan.data.source_clips import Drop

_LISTED = 20
REPORT_FILE = "lapwan_report.json"


def plan_lines(plan: CachePlan, pixels_per_second: float | None = None) -> list[str]:
    """The plan in words: what is there, what will be made and why, how long, what is dropped and why.

    Args:
        pixels_per_second: how fast the last run into this folder was, for the estimate.
    """
    clips = len({wanted.stem for wanted in plan.items})
    lines = [f"{plan.folder}: {len(plan.items)} items of {clips} clips from {plan.cache.dataset}"]
    sizes = Counter((len(w.indices), *reversed(w.crop.bucket)) for w in plan.items)
    for (frames, height, width), count in sorted(sizes.items()):
        lines.append(f"  {count} x {frames} frames of {height}x{width}")
    for what, todo in (("latents", plan.latents_todo), ("text", plan.text_todo), ("regions", plan.roi_todo)):
        lines += [f"  {what}: {count} to encode ({reason})" for reason, count in _reasons(todo)]
    if plan.prompts_todo:
        lines.append(f"  empty and negative prompt: to encode ({plan.prompts_todo})")
    if plan.latents_todo:
        room = _free(plan)
        lines.append(f"  disk for latents: {size_text(plan.latents_bytes())} of {size_text(room)} free")
        if plan.latents_bytes() > room:
            lines.append("  warning: that is more than there is")
        if pixels_per_second:
            lines.append(f"  time for latents: about {duration_text(plan.pixels() / pixels_per_second)}, "
                         "as fast as the last run")
    if plan.unverified:
        lines.append(f"  {len(plan.unverified)} files made by another tool are taken as they are, unverified")
    if plan.orphans:
        lines.append(f"  {len(plan.orphans)} cache files belong to no clip of the dataset; they stay")
    return lines + drop_lines(plan.drops)


def drop_lines(drops: Sequence[Drop]) -> list[str]:
    """One line a dropped clip, the first few in full."""
    lines = [f"  dropped: {drop.where}: {drop.reason}" for drop in drops[:_LISTED]]
    if len(drops) > _LISTED:
        lines.append(f"  dropped: {len(drops) - _LISTED} more")
    return lines


def write_report(plan: CachePlan, items: Sequence[CachedItem], drops: Sequence[Drop]) -> None:
    """`lapwan_report.json`: what the last run left out and why, and what it could not vouch for."""
    report = {
        "dataset": str(plan.cache.dataset.absolute()), "items": len(items),
        "dropped": [{"clip": drop.where, "reason": drop.reason} for drop in drops],
        "unverified": plan.unverified, "orphans": plan.orphans,
    }
    text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    path = plan.folder / REPORT_FILE
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        files.write_text(path, text)


def _reasons(todo: Mapping[str, tuple[Wanted, str]]) -> list[tuple[str, int]]:
    """Reasons with their counts; missing first."""
    counts = Counter(reason for _, reason in todo.values())
    return sorted(counts.items(), key=lambda pair: (pair[0] != MISSING, pair[0]))


def _free(plan: CachePlan) -> int:
    folder = plan.folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free


def duration_text(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size_text(size: float) -> str:
    """Bytes in a unit people read."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
