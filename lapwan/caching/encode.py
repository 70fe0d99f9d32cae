"""Carrying out a cache plan: decode, encode and write overlapped, every file whole or absent.

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
from lapwan.caching.layout import PROMPTS_FILE, Recipe, write_latents, write_prompts, write_roi, write_text_features
from lapwan.caching.plan import CachePlan, Wanted, prompts_recipe
from lapwan.data.regions import region
from lapwan.data.source_clips import Drop
from lapwan.data.video import BadClip
from lapwan.errors import UserError
from lapwan.memory.generation import free_bytes, text_encoder_bytes
from lapwan.memory.plan import GIB, needs
from lapwan.memory.streaming import Residence
from lapwan.models.device import pick_device
from lapwan.models.spec import ModelSpec
from lapwan.wan.image_condition import encode_condition, with_mask
from lapwan.wan.text import TextEncoder, encode_text, load_text_encoder
from lapwan.wan.vae import channels_last, encode, load_vae

_BATCH_PIXELS = 480 * 832 * 81  # one full-size clip: smaller ones share a batch up to this
_LARGEST_BATCH = 8
_TEXT_BATCH = 16
_WRITES_AHEAD = 8
_WORTH_WORKERS = 200_000_000  # source pixels: a second or so of decoding


@dataclass
class Seconds:
    """Time spent, summed: `decode` over all workers, `wait` for them, `encode`, `write` in its own thread; `latents`
    and `text` are the whole of each part."""

    decode: float = 0.0
    wait: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    latents: float = 0.0
    text: float = 0.0
    total: float = 0.0


@dataclass
class Outcome:
    """What was done: counts of files written with their recipes, pixels encoded, clips that failed, time spent."""

    latents: int = 0
    texts: int = 0
    rois: int = 0
    pixels: int = 0
    written: dict[str, Recipe] = field(default_factory=dict)
    failures: list[Drop] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)


@dataclass(frozen=True)
class How:
    """Where and how to encode; `batch` None: by size."""

    device: torch.device
    workers: int
    batch: int | None = None
    vae_dtype: torch.dtype = torch.float32


def how_to(
    device: str, workers: int | None, batch: int | None, vae_dtype: str, plan: CachePlan, local_rank: int = 0
) -> How:
    """Settle device and worker count: decoding moves to other processes when the work is worth their start.

    Raises:
        UserError: no such device.
    """
    chosen = pick_device(device, local_rank)
    if workers is None:
        pixels = sum(len(w.indices) * w.facts.width * w.facts.height for w, _ in plan.latents_todo.values())
        workers = min(8, os.cpu_count() or 1) if pixels > _WORTH_WORKERS else 0
    return How(chosen, workers, batch, getattr(torch, vae_dtype))


def carry_out(plan: CachePlan, spec: ModelSpec, how: How) -> Outcome:
    """Make every file the plan asks for. Clips that cannot be decoded are reported, not raised.

    Raises:
        OSError: the disk is full or not writable; what was written stays whole.
    """
    outcome = Outcome()
    start = time.perf_counter()
    if plan.roi_todo:
        _encode_regions(plan, outcome)
    if plan.latents_todo:
        _encode_latents(plan, spec, how, outcome)
    if plan.text_todo or plan.prompts_todo:
        _encode_texts(plan, spec, how, outcome)
    outcome.seconds.total = time.perf_counter() - start
    return outcome


def _fail(outcome: Outcome, wanted: Wanted, reason: str) -> None:
    outcome.failures.append(Drop(wanted.clip.where, reason, wanted.stem))


def _encode_regions(plan: CachePlan, outcome: Outcome) -> None:
    encoders = plan.encoders
    with console.progress("regions", len(plan.roi_todo), "clip") as bar:
        for name, (wanted, _) in plan.roi_todo.items():
            clip = wanted.clip
            try:
                roi = region(clip.roi, clip.mask, clip.path, wanted.indices, wanted.crop, encoders.fps, wanted.facts,
                             wanted.source_fps, encoders.strides)
            except BadClip as error:
                _fail(outcome, wanted, f"region: {error}")
            else:
                assert wanted.roi_recipe is not None
                write_roi(plan.folder / name, roi, wanted.roi_recipe)
                outcome.written[name] = wanted.roi_recipe
                outcome.rois += 1
            bar.advance()


def _encode_latents(plan: CachePlan, spec: ModelSpec, how: How, outcome: Outcome) -> None:
    begun = time.perf_counter()
    todo = {wanted.id: wanted for wanted, _ in plan.latents_todo.values()}
    # Equal sizes side by side make whole batches; windows of a clip stay together.
    ordered = sorted(todo.values(), key=lambda wanted: (len(wanted.indices), wanted.crop.bucket))
    jobs = make_jobs(ordered, plan.encoders.fps)
    with (
        Decoder(jobs, how.workers) as decoded,  # the workers start while the VAE is loaded
        ThreadPoolExecutor(1, thread_name_prefix="cache-writer") as writer,
        console.progress("latents", len(todo), "clip") as bar,
    ):
        vae = load_vae(spec, how.vae_dtype, how.device)
        if how.device.type == "cuda":
            channels_last(vae)
        writes: list[Future[None]] = []
        for batch in _batches(decoded, todo, how, outcome, bar.advance):
            started = time.perf_counter()
            latents, conditions = _fitting(vae, [frames for _, frames in batch], plan.encoders.condition)
            outcome.seconds.encode += time.perf_counter() - started
            for row, (wanted, _) in enumerate(batch):
                condition = None if conditions is None else conditions[row]
                writes.append(writer.submit(_write, plan, wanted, latents[row], condition, outcome))
            while len(writes) > _WRITES_AHEAD:
                writes.pop(0).result()
            bar.advance(len(batch))
        for write in writes:
            write.result()
    outcome.seconds.latents = time.perf_counter() - begun


def _batches(
    items: Iterator[Decoded], todo: dict[str, Wanted], how: How, outcome: Outcome, failed: Callable[[], None]
) -> Iterator[list[tuple[Wanted, np.ndarray]]]:
    """Decoded items in groups of one shape; time spent waiting for the decoders is counted."""
    group: list[tuple[Wanted, np.ndarray]] = []
    while True:
        started = time.perf_counter()
        decoded = next(items, None)
        outcome.seconds.wait += time.perf_counter() - started
        if decoded is None:
            break
        outcome.seconds.decode += decoded.seconds
        wanted = todo[decoded.id]
        if decoded.frames is None:
            _fail(outcome, wanted, decoded.failure or "cannot be decoded")
            failed()
            continue
        if group and group[0][1].shape != decoded.frames.shape:
            yield group
            group = []
        group.append((wanted, decoded.frames))
        if len(group) >= (how.batch or batch_size(decoded.frames.shape)):
            yield group
            group = []
    if group:
        yield group


def batch_size(shape_THWC: tuple[int, ...]) -> int:
    """Clips an encode takes at once: as many pixels as one full-size clip, at most 8 clips."""
    return max(1, min(_LARGEST_BATCH, _BATCH_PIXELS // (shape_THWC[0] * shape_THWC[1] * shape_THWC[2])))


def to_pixels(frames_THWC: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [T, H, W, 3] -> fp32 [3, T, H, W] in [-1, 1]; the bytes cross to the device, not the floats."""
    return torch.from_numpy(frames_THWC).to(device).permute(3, 0, 1, 2).float() / 127.5 - 1


def _fitting(vae: Any, clips: list[np.ndarray], condition: bool) -> tuple[Tensor, Tensor | None]:
    """`_latents_of`, clip by clip where the memory of the device does not hold the batch."""
    try:
        return _latents_of(vae, clips, condition)
    except torch.OutOfMemoryError:
        if len(clips) == 1:
            frames, height, width, _ = clips[0].shape
            raise UserError(f"the memory of {vae.device} does not hold the VAE on {frames} frames of {height}x{width}; "
                            "use --vae-dtype bfloat16, a smaller --size or fewer --num-frames") from None
    torch.cuda.empty_cache()
    parts = [_fitting(vae, [clip], condition) for clip in clips]
    conditions = [part[1] for part in parts if part[1] is not None]
    return torch.cat([part[0] for part in parts]), torch.cat(conditions) if conditions else None


@torch.no_grad()
def _latents_of(vae: Any, clips: list[np.ndarray], condition: bool) -> tuple[Tensor, Tensor | None]:
    pixels_BCTHW = torch.stack([to_pixels(frames, vae.device) for frames in clips])
    latents = encode(vae, pixels_BCTHW)
    conditions = None
    if condition:
        frames = pixels_BCTHW.shape[2]
        # Of one frame, the condition is the clip itself; longer ones differ from it everywhere but at the start.
        still = latents if frames == 1 else encode_condition(vae, pixels_BCTHW[:, :, 0], frames)
        conditions = with_mask(still).cpu()
    return latents.cpu(), conditions


def _write(plan: CachePlan, wanted: Wanted, latents: Tensor, condition: Tensor | None, outcome: Outcome) -> None:
    started = time.perf_counter()
    if not all(bool(torch.isfinite(part).all()) for part in (latents, condition) if part is not None):
        _fail(outcome, wanted, "its latents are not finite: the VAE overflows on it; use --vae-dtype float32")
        return
    dtype = getattr(torch, plan.encoders.latents_dtype)
    write_latents(
        plan.folder / wanted.latents, latents.to(dtype), None if condition is None else condition.to(dtype),
        (wanted.facts.width, wanted.facts.height), None if wanted.window is None else wanted.window.frames,
        wanted.latents_recipe,
    )
    outcome.latents += 1
    outcome.pixels += len(wanted.indices) * wanted.crop.bucket[0] * wanted.crop.bucket[1]
    outcome.written[wanted.latents] = wanted.latents_recipe
    outcome.seconds.write += time.perf_counter() - started


def _text_encoder(spec: ModelSpec, device: torch.device) -> TextEncoder:
    """On the device; where that does not hold it, its blocks stream from host memory, with the same features."""
    free = free_bytes(device)
    if free is None or needs(text_encoder_bytes(spec)) <= free:
        return load_text_encoder(spec, device=device)
    console.log(f"the text encoder streams to {device}, whose {free / GIB:.1f} GiB do not hold it")
    encoder = load_text_encoder(spec)
    Residence(encoder.model, (), device, range(len(encoder.model.encoder.block)), "encoder.block").fetch()
    return encoder


def _encode_texts(plan: CachePlan, spec: ModelSpec, how: How, outcome: Outcome) -> None:
    """Each distinct caption once, sorted by length so that a batch pads little."""
    started = time.perf_counter()
    encoders = plan.encoders
    dtype = getattr(torch, encoders.text_dtype)
    encoder = _text_encoder(spec, how.device)
    files: dict[str, list[tuple[str, Wanted]]] = {}
    for name, (wanted, _) in plan.text_todo.items():
        files.setdefault(wanted.clip.caption, []).append((name, wanted))
    captions = sorted(files, key=len)
    with console.progress("captions", len(captions), "caption") as bar:
        for first in range(0, len(captions), _TEXT_BATCH):
            batch = captions[first : first + _TEXT_BATCH]
            for caption, features in zip(batch, encode_text(encoder, batch, encoders.text_length), strict=True):
                stored = features.to(dtype).cpu()
                if not bool(torch.isfinite(stored).all()):
                    _fail(outcome, files[caption][0][1], "its text features are not finite; use --dtype float32")
                    continue
                for name, wanted in files[caption]:
                    write_text_features(plan.folder / name, stored, caption, wanted.text_recipe)
                    outcome.written[name] = wanted.text_recipe
                    outcome.texts += 1
            bar.advance(len(batch))
    if plan.prompts_todo:
        empty, negative = encode_text(encoder, ["", encoders.negative], encoders.text_length)
        write_prompts(plan.folder / PROMPTS_FILE, empty.to(dtype), negative.to(dtype), prompts_recipe(encoders))
    outcome.seconds.text = time.perf_counter() - started
