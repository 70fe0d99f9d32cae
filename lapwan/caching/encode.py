"""Encoding the files of a cache plan: decoding, encoding and writing overlap; every file is complete or absent.

Shapes: B batch, T frames (pixels) or latent frames, H, W, C channels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapwan import console
from lapwan.caching.decoder import Decoded, Decoder, make_jobs
from lapwan.caching.layout import (
    PROMPTS_FILE,
    CacheRecipe,
    write_latents,
    write_prompts,
    write_roi,
    write_text_features,
)
from lapwan.caching.plan import CachePlan, PlannedItem
from lapwan.caching.stale import prompts_recipe
from lapwan.console import count_text, listed
from lapwan.data.dropped_clips import BadClip, DroppedClip
from lapwan.data.regions import latent_region
from lapwan.errors import UserError
from lapwan.memory.generation import text_encoder_bytes
from lapwan.memory.plan import GIB, required_bytes
from lapwan.memory.streaming import offload_by_hooks
from lapwan.models.device import free_bytes, pick_device
from lapwan.models.spec import ModelSpec
from lapwan.wan.image_condition import image_condition, with_mask
from lapwan.wan.text import TextEncoder, encode_text, load_text_encoder
from lapwan.wan.vae import channels_last, encode, load_vae

_BATCH_PIXELS = 480 * 832 * 81  # of a batch: one full-size clip, or several smaller ones
_LARGEST_BATCH = 8
_TEXT_BATCH = 16
_PIXELS_FOR_WORKERS = 200_000_000  # source pixels, about a second of decoding: above, worker processes pay off


@dataclass
class EncodeSeconds:
    """Time spent: `decode`, summed over all workers; `wait` for them; `encode`; `write`, in its own thread; all of
    `latents` and of `text`."""

    decode: float = 0.0
    wait: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    latents: float = 0.0
    text: float = 0.0
    total: float = 0.0


@dataclass
class EncodeResult:
    """Counts of files written, their recipes by name, pixels encoded, clips that failed, time spent."""

    latents: int = 0
    texts: int = 0
    rois: int = 0
    pixels: int = 0
    written: dict[str, CacheRecipe] = field(default_factory=dict)
    failures: list[DroppedClip] = field(default_factory=list)
    seconds: EncodeSeconds = field(default_factory=EncodeSeconds)


@dataclass(frozen=True)
class EncodeOptions:
    """Device, worker processes and precision; `batch` None chooses the batch by size."""

    device: torch.device
    workers: int
    batch: int | None = None
    vae_dtype: torch.dtype = torch.float32


def encode_options(
    device: str, workers: int | None, batch: int | None, vae_dtype: str, plan: CachePlan, local_rank: int = 0
) -> EncodeOptions:
    """Resolve device and worker count: decoding uses worker processes if there is enough of it.

    Raises:
        UserError: no such device.
    """
    chosen = pick_device(device, local_rank)
    if workers is None:
        pixels = sum(len(item.indices) * item.facts.width * item.facts.height for item, _ in plan.latents_todo.values())
        workers = min(8, os.cpu_count() or 1) if pixels > _PIXELS_FOR_WORKERS else 0
    return EncodeOptions(chosen, workers, batch, getattr(torch, vae_dtype))


def encode_files(plan: CachePlan, spec: ModelSpec, options: EncodeOptions) -> EncodeResult:
    """Encode all files that the plan lists. Clips that cannot be decoded become `failures`, not errors.

    Raises:
        OSError: the disk is full or not writable; files already written stay complete.
    """
    result = EncodeResult()
    start = time.perf_counter()
    if plan.roi_todo:
        _encode_regions(plan, result)
    if plan.latents_todo:
        _encode_latents(plan, spec, options, result)
    if plan.text_todo or plan.prompts_todo:
        _encode_texts(plan, spec, options, result)
    result.seconds.total = time.perf_counter() - start
    return result


def _fail(result: EncodeResult, item: PlannedItem, reason: str) -> None:
    result.failures.append(DroppedClip(item.clip.name, reason, item.stem))


def _encode_regions(plan: CachePlan, result: EncodeResult) -> None:
    encoders = plan.encoders
    empty: list[str] = []
    with console.progress("regions", len(plan.roi_todo), "clip") as bar:
        for name, (item, _) in plan.roi_todo.items():
            clip = item.clip
            try:
                roi = latent_region(clip.roi, clip.mask, clip.path, item.indices, item.crop, encoders.fps, item.facts,
                                    item.source_fps, encoders.strides)
            except BadClip as error:
                _fail(result, item, f"region: {error}")
            else:
                assert item.roi_recipe is not None
                empty += [] if roi.any() else [clip.name]
                write_roi(plan.folder / name, roi, item.roi_recipe)
                result.written[name] = item.roi_recipe
                result.rois += 1
            bar.advance()
    if empty:
        console.warn(f"the region of {count_text(len(empty), 'item')} is empty in the frames that are cached: "
                     f"{listed(empty, between='; ')}; check roi, roi_units and which frames are annotated")


def _encode_latents(plan: CachePlan, spec: ModelSpec, options: EncodeOptions, result: EncodeResult) -> None:
    begun = time.perf_counter()
    todo = {item.id: item for item, _ in plan.latents_todo.values()}
    # Equal sizes next to each other make full batches; windows of a clip stay together.
    ordered = sorted(todo.values(), key=lambda item: (len(item.indices), item.crop.bucket))
    jobs = make_jobs(ordered, plan.encoders.fps)
    with (
        Decoder(jobs, options.workers) as decoded,  # the workers start while the VAE loads
        ThreadPoolExecutor(1, thread_name_prefix="cache-writer") as writer,
        console.progress("latents", len(todo), "clip") as bar,
    ):
        vae = load_vae(spec, options.vae_dtype, options.device)
        if options.device.type == "cuda":
            channels_last(vae)
        bar.advance(0)  # the VAE's loading is over, and not a part of the speed
        writes: list[Future[None]] = []
        for batch in _batches(decoded, todo, options, result, bar.advance):
            for write in writes:  # a kill loses what is encoded now, and nothing from before
                write.result()
            writes.clear()
            started = time.perf_counter()
            latents, conditions = _encode_clips(vae, [frames for _, frames in batch], plan.encoders.condition,
                                                plan.encoders.last_image)
            result.seconds.encode += time.perf_counter() - started
            for row, (item, _) in enumerate(batch):
                condition = None if conditions is None else conditions[row]
                writes.append(writer.submit(_write, plan, item, latents[row], condition, result))
            bar.advance(len(batch))
        for write in writes:
            write.result()
    result.seconds.latents = time.perf_counter() - begun


def _batches(
    items: Iterator[Decoded], todo: dict[str, PlannedItem], options: EncodeOptions, result: EncodeResult,
    failed: Callable[[], None],
) -> Iterator[list[tuple[PlannedItem, np.ndarray]]]:
    """Decoded items in batches of one shape. Adds to the times of waiting and decoding."""
    group: list[tuple[PlannedItem, np.ndarray]] = []
    while True:
        started = time.perf_counter()
        decoded = next(items, None)
        result.seconds.wait += time.perf_counter() - started
        if decoded is None:
            break
        result.seconds.decode += decoded.seconds
        item = todo[decoded.id]
        if decoded.frames is None:
            _fail(result, item, decoded.failure or "cannot be decoded")
            failed()
            continue
        if group and group[0][1].shape != decoded.frames.shape:
            yield group
            group = []
        group.append((item, decoded.frames))
        if len(group) >= (options.batch or batch_size(decoded.frames.shape)):
            yield group
            group = []
    if group:
        yield group


def batch_size(shape_THWC: tuple[int, ...]) -> int:
    """Clips per batch: as many pixels as one full-size clip, at most 8 clips."""
    return max(1, min(_LARGEST_BATCH, _BATCH_PIXELS // (shape_THWC[0] * shape_THWC[1] * shape_THWC[2])))


def to_pixels(frames_THWC: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [T, H, W, 3] -> fp32 [3, T, H, W] in [-1, 1]; transferred to the device as bytes."""
    return torch.from_numpy(frames_THWC).to(device).permute(3, 0, 1, 2).float() / 127.5 - 1


def _encode_clips(
    vae: Any, clips: list[np.ndarray], condition: bool, last_image: bool
) -> tuple[Tensor, Tensor | None]:
    """(latents, image conditions) of a batch; clip by clip if the device runs out of memory."""
    try:
        return _encode_batch(vae, clips, condition, last_image)
    except torch.OutOfMemoryError:
        if len(clips) == 1:
            frames, height, width, _ = clips[0].shape
            raise UserError(f"the memory of {vae.device} is too small for the VAE on {frames} frames of "
                            f"{height}x{width}; use --vae-dtype bfloat16, a smaller --size or fewer --num-frames"
                            ) from None
    torch.cuda.empty_cache()
    parts = [_encode_clips(vae, [clip], condition, last_image) for clip in clips]
    conditions = [part[1] for part in parts if part[1] is not None]
    return torch.cat([part[0] for part in parts]), torch.cat(conditions) if conditions else None


@torch.no_grad()
def _encode_batch(
    vae: Any, clips: list[np.ndarray], condition: bool, last_image: bool
) -> tuple[Tensor, Tensor | None]:
    pixels_BCTHW = torch.stack([to_pixels(frames, vae.device) for frames in clips])
    latents = encode(vae, pixels_BCTHW)
    conditions = None
    if condition:
        frames = pixels_BCTHW.shape[2]
        if frames == 1:  # the condition is the clip itself
            conditions = with_mask(latents).cpu()
        else:
            last = pixels_BCTHW[:, :, -1] if last_image else None
            conditions = image_condition(vae, pixels_BCTHW[:, :, 0], frames, last).cpu()
    return latents.cpu(), conditions


def _write(plan: CachePlan, item: PlannedItem, latents: Tensor, condition: Tensor | None, result: EncodeResult) -> None:
    started = time.perf_counter()
    if not all(bool(torch.isfinite(part).all()) for part in (latents, condition) if part is not None):
        _fail(result, item, "its latents are not finite: the VAE overflows on it; use --vae-dtype float32")
        return
    dtype = getattr(torch, plan.encoders.latents_dtype)
    write_latents(
        plan.folder / item.latents, latents.to(dtype), None if condition is None else condition.to(dtype),
        item.crop.bucket if item.window is not None else (item.facts.width, item.facts.height),
        None if item.window is None else item.window.frames, item.latents_recipe,
    )
    result.latents += 1
    result.pixels += item.pixels
    result.written[item.latents] = item.latents_recipe
    result.seconds.write += time.perf_counter() - started


def _text_encoder(spec: ModelSpec, device: torch.device) -> TextEncoder:
    """The text encoder on the device; if it does not fit, its blocks stream from host memory, with the same output."""
    free = free_bytes(device)
    if free is None or required_bytes(text_encoder_bytes(spec)) <= free:
        return load_text_encoder(spec, device=device)
    console.log(f"the text encoder does not fit in the {free / GIB:.1f} GiB of {device}; it streams from host memory")
    encoder = load_text_encoder(spec)
    offload_by_hooks(encoder.model, device, range(len(encoder.model.encoder.block)), "encoder.block").onload()
    return encoder


def _encode_texts(plan: CachePlan, spec: ModelSpec, options: EncodeOptions, result: EncodeResult) -> None:
    """Encode each distinct caption once, sorted by length so that batches need little padding."""
    started = time.perf_counter()
    encoders = plan.encoders
    dtype = getattr(torch, encoders.text_dtype)
    encoder = _text_encoder(spec, options.device)
    files: dict[str, list[tuple[str, PlannedItem]]] = {}
    for name, (item, _) in plan.text_todo.items():
        files.setdefault(item.clip.caption, []).append((name, item))
    captions = sorted(files, key=len)
    with console.progress("captions", len(captions), "caption") as bar:
        for first in range(0, len(captions), _TEXT_BATCH):
            batch = captions[first : first + _TEXT_BATCH]
            for caption, features in zip(batch, encode_text(encoder, batch, encoders.text_length), strict=True):
                stored = features.to(dtype).cpu()
                if not bool(torch.isfinite(stored).all()):
                    _fail(result, files[caption][0][1], "its text features are not finite; use --dtype float32")
                    continue
                for name, item in files[caption]:
                    write_text_features(plan.folder / name, stored, caption, item.text_recipe)
                    result.written[name] = item.text_recipe
                    result.texts += 1
            bar.advance(len(batch))
    if plan.prompts_todo:
        empty, negative = encode_text(encoder, ["", encoders.negative], encoders.text_length)
        write_prompts(plan.folder / PROMPTS_FILE, empty.to(dtype), negative.to(dtype), prompts_recipe(encoders))
    result.seconds.text = time.perf_counter() - started
