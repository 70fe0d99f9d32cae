"""A dataset before it is encoded: what the crop keeps, which frames become items, regions, and why clips are dropped.

One frame of each clip is decoded, by worker processes; nothing is encoded. How the sheet is drawn and written:
`report/dataset_sheet.py`. What the cached latents decode to: `preview.py`. No torch.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lapwan import console
from lapwan.caching.decoder import OrderedResults
from lapwan.caching.plan import CachePlan, PlannedItem
from lapwan.caching.stale import MISSING
from lapwan.console import count_text
from lapwan.data.buckets import Crop
from lapwan.data.clips import SourceClip
from lapwan.data.dropped_clips import BadClip
from lapwan.data.regions import pixel_region
from lapwan.data.video import VideoFacts, probe, read_frames
from lapwan.report.dataset_sheet import MOST_TILES, SheetCard, SheetHead, write_html, write_png

_SIDE = 256  # pixels of a picture's longer side
_QUALITY = 82  # of its JPEG
_INTO_CLIP = 16  # frames after the start of the first item, at most: the first frames are often black
_FEW = 12  # clips below which worker processes take longer to start than to decode
_PREFETCH = 16  # pictures
_LOST, _ENLARGED = 0.35, 1.5  # share of the picture that the crop may drop, and enlargement, without a note
_CROP_LINE, _REGION_LINE = (78, 203, 164), (255, 220, 0)


def write_sheet(path: Path, plans: Sequence[CachePlan]) -> None:
    """Write the sheet of one or several cache plans to an .html or .png file."""
    jobs = [job for plan in plans for job in _jobs(plan)]
    page, total = path.suffix.lower() != ".png", len(jobs)
    if not page and total > MOST_TILES:
        jobs = sorted(jobs, key=lambda job: job.card.dropped is None)[:MOST_TILES]
        console.log(f"{path} shows {MOST_TILES} of {total} clips, dropped ones first; an .html sheet shows all")
    workers = (os.cpu_count() or 1) if len(jobs) > _FEW else 0
    with (
        console.progress("preview", len(jobs), "clip") as bar,
        OrderedResults(jobs, draw_card, _crashed, workers, _PREFETCH) as cards,
    ):
        counted = _counted(cards, bar.advance)
        if page:
            write_html(path, _head(plans, jobs), counted)
        else:
            write_png(path, counted)


def _counted(cards: Iterator[SheetCard], advance: Any) -> Iterator[SheetCard]:
    for card in cards:
        advance()
        yield card


@dataclass(frozen=True)
class CardJob:
    """A card without its picture, and which frame to show: small and picklable, to be sent to a worker.

    `facts` and `crop` are None for a clip that is dropped.
    """

    card: SheetCard
    clip: SourceClip | None
    fps: float
    source_fps: float | None
    frame: int = 0
    facts: VideoFacts | None = None
    crop: Crop | None = None


def _jobs(plan: CachePlan) -> Iterator[CardJob]:
    """One a clip, in the order of the dataset; clips that the dataset's reader dropped come last."""
    items: dict[str, list[PlannedItem]] = {}
    for item in plan.items:
        items.setdefault(item.clip.name, []).append(item)
    dropped = {drop.name: drop.reason for drop in plan.drops}
    fps, source_fps = plan.encoders.fps, plan.cache.extraction.source_fps
    for clip in plan.cache.clips:
        card = SheetCard(clip.name, clip.caption, _label(clip))
        if clip.name in items:
            first = items[clip.name][0]
            frame = first.indices.start + min(len(first.indices) // 2, _INTO_CLIP)
            yield CardJob(_used_card(card, items[clip.name], plan), clip, fps, source_fps, frame, first.facts,
                          first.crop)
        else:
            yield CardJob(replace(card, dropped=dropped.pop(clip.name, "cannot be used")), clip, fps, source_fps)
    for name, reason in dropped.items():
        yield CardJob(SheetCard(name, "", dropped=reason), None, fps, source_fps)


def _label(clip: SourceClip) -> str:
    name = clip.labels.get("label_name")
    text = str(name if name is not None else clip.labels.get("label", ""))
    return f"{text} (fallback)" if text and clip.labels.get("fallback") else text


def _used_card(card: SheetCard, items: Sequence[PlannedItem], plan: CachePlan) -> SheetCard:
    first = items[0]
    facts, crop = first.facts, first.crop
    total = facts.count_at(plan.encoders.fps)
    width, height = crop.bucket
    kept = width * height / (crop.resized[0] * crop.resized[1])
    scale = crop.resized[0] / facts.width
    notes = []
    if 1 - kept > _LOST:
        notes.append(f"the crop drops {1 - kept:.0%} of the picture")
    if scale > _ENLARGED:
        notes.append(f"enlarged {scale:.1f} times")
    if not facts.is_image and facts.fps < 0.95 * plan.encoders.fps:
        notes.append(f"{facts.fps:g} fps, below the model's {plan.encoders.fps:g}: frames repeat")
    todo = Counter(_state(plan, item) for item in items)
    frames = ", ".join(str(n) for n in sorted({len(item.indices) for item in items}))
    rate = "" if facts.is_image else f", {facts.fps:g} fps, {facts.seconds:.1f} s"
    details = [f"{facts.width}x{facts.height}{rate}", f"to {width}x{height}",
               f"{count_text(len(items), 'item')} of {frames} frames"]
    details += [f"{count} {reason}" if len(todo) > 1 else reason for reason, count in todo.items()]
    if first.clip.split:
        details.append(f"split {first.clip.split}")
    return replace(
        card, bucket=f"{width}x{height}", details=tuple(details), notes=tuple(notes),
        windows=tuple((item.indices.start / total, len(item.indices) / total) for item in items),
    )


def _state(plan: CachePlan, item: PlannedItem) -> str:
    reason = plan.latents_todo[item.latents][1] if item.latents in plan.latents_todo else None
    return "cached" if reason is None else "not cached yet" if reason == MISSING else f"to cache again ({reason})"


def _head(plans: Sequence[CachePlan], jobs: Sequence[CardJob]) -> SheetHead:
    dropped = sum(job.card.dropped is not None for job in jobs)
    labels = Counter(job.card.label for job in jobs if job.card.label)
    buckets = Counter(job.card.bucket for job in jobs if job.card.bucket)
    items = sum(len(plan.items) for plan in plans)
    facts = [("dataset", ", ".join(dict.fromkeys(str(plan.cache.dataset) for plan in plans))),
             ("clips", f"{len(jobs)}: {len(jobs) - dropped} used as {count_text(items, 'item')}, {dropped} dropped"),
             ("sizes", _counts(buckets) or "none")]
    if labels:
        facts.append(("labels", _counts(labels)))
    facts.append(("pictures", "bright: what the crop keeps; yellow: the region; the bar below: the frames that become "
                              "items"))
    return SheetHead(f"{plans[0].cache.dataset.name} before caching", facts, sorted(labels), sorted(buckets))


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items(), key=lambda pair: -pair[1]))


def draw_card(job: CardJob) -> SheetCard:
    """The card with its picture; one that cannot be decoded gets a note."""
    if job.clip is None:
        return job.card
    try:
        picture, notes = _picture(job, job.clip)
    except (BadClip, OSError) as error:
        if job.card.dropped is not None:
            return job.card  # which says why already
        return replace(job.card, notes=(*job.card.notes, f"cannot be shown: {error}"))
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "jpeg", quality=_QUALITY)
    return replace(job.card, picture=buffer.getvalue(), notes=(*job.card.notes, *notes))


def _crashed(job: CardJob) -> SheetCard:
    return replace(job.card, notes=(*job.card.notes, "cannot be shown: the decoder crashed on it"))


def _picture(job: CardJob, clip: SourceClip) -> tuple[np.ndarray, list[str]]:
    """(the whole frame with crop and region drawn in, uint8 [H, W, 3]; notes)."""
    facts = job.facts or probe(clip.path, job.fps, job.source_fps)
    scale = _SIDE / max(facts.width, facts.height)
    size = max(1, round(facts.width * scale)), max(1, round(facts.height * scale))
    whole = Crop(size, 0, 0, size)
    pixels = read_frames(clip.path, [job.frame], whole, job.fps, facts, job.source_fps)[0]
    if job.crop is None:
        return pixels, []
    shown, notes = _with_crop(pixels, job.crop), []
    if clip.roi or clip.mask is not None:
        region = pixel_region(clip.roi, clip.mask, clip.path, [job.frame], whole, job.fps, facts, job.source_fps)[0]
        inside = region >= 0.5
        if not inside.any():
            notes.append("no region in this frame")
        shown[_outline(inside)] = _REGION_LINE
    return shown, notes


def _with_crop(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    """What the crop drops is darkened; a line goes round what it keeps."""
    height, width = pixels.shape[:2]
    left, top = round(crop.left * width / crop.resized[0]), round(crop.top * height / crop.resized[1])
    right = min(width, left + max(1, round(crop.bucket[0] * width / crop.resized[0])))
    bottom = min(height, top + max(1, round(crop.bucket[1] * height / crop.resized[1])))
    kept = np.zeros((height, width), bool)
    kept[top:bottom, left:right] = True
    shown = np.where(kept[..., None], pixels, pixels // 3)
    shown[_outline(kept)] = _CROP_LINE
    return shown


def _outline(inside: np.ndarray, thickness: int = 2) -> np.ndarray:
    """The pixels of a mask [H, W] that are within `thickness` of its edge."""
    core: np.ndarray = inside
    for _ in range(thickness):
        around = np.pad(core, 1)
        core = core & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    edge: np.ndarray = inside & ~core
    return edge
