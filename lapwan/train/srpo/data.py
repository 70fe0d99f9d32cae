"""What preference alignment trains on: prompts with their text features, or the clips of a cache.

Text features are encoded once and kept in one safetensors file: a tensor per prompt, named by the prompt's hash. A
prompt that the file already has is never encoded again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lapwan import console, files
from lapwan.caching.collate import Batch
from lapwan.caching.index import CachedItem, CacheIndex
from lapwan.caching.read import load_index, read_prompt
from lapwan.checkpoints.container import read_header
from lapwan.checkpoints.fingerprints import json_fingerprint
from lapwan.checkpoints.tensors import save_tensors
from lapwan.data.prompts import choose_held_out, read_prompts
from lapwan.errors import UserError
from lapwan.models.fingerprints import text_encoder_fingerprint
from lapwan.models.spec import ModelSpec
from lapwan.settings.srpo import SrpoSettings
from lapwan.train.clip_store import ClipStore, check_cache, training_items

FEATURES_FILE = "text_features.safetensors"
_ENCODER_BATCH = 16  # prompts in one pass of the text encoder
_ENCODER = "lapwan.text_encoder"


@dataclass(frozen=True)
class SrpoData:
    """Captions to train on, held-out captions, and the cache they come from, if any.

    `bucket` is the (frames, height, width) to train at; `items` and `held_items` are the cache's clips, one per
    caption of `captions` and `held_out`.
    """

    captions: tuple[str, ...]
    held_out: tuple[str, ...]
    bucket: tuple[int, int, int]
    offline: bool
    negative: str
    index: CacheIndex | None = None
    items: tuple[CachedItem, ...] = ()
    held_items: tuple[CachedItem, ...] = ()

    @property
    def ids(self) -> list[str]:
        """Keys of the random draws: a clip's id, or a prompt's hash, which does not depend on its line in the file."""
        return [item.id for item in self.items] or [_hash(caption) for caption in self.captions]

    @property
    def identity(self) -> dict[str, str]:
        """Hash of the prompts' and clips' contents: what a resumed run is compared by."""
        clips = [[i.id, i.bucket, i.caption, i.repeats, i.fingerprints] for i in (*self.items, *self.held_items)]
        return {"prompts": json_fingerprint([self.captions, self.held_out, self.negative, clips])}


def read_data(settings: SrpoSettings, spec: ModelSpec) -> SrpoData:
    """Read the prompts or the cache's index, split off the held-out prompts, and check both against the model.

    Raises:
        UserError: prompts, sizes or a cache that cannot be trained on.
    """
    height, width = settings.size or spec.defaults.size
    spec.latent_shape(settings.num_frames, height, width)  # refuses odd sizes and lengths
    if spec.requires_image and settings.num_frames == 1:
        raise UserError("num_frames = 1 on an image-to-video model: its only frame is the given image, so nothing is "
                        "left to align; set num_frames to a video's (4N+1), or take a text-to-video model")
    rule = settings.held_out
    if spec.requires_image and (rule.size is not None or rule.num_frames is not None):
        raise UserError("held_out.size and held_out.num_frames are for text-to-video models; an image-to-video model's "
                        "held-out clips keep the size of their first frame")
    if rule.count and (rule.size is not None or rule.num_frames is not None):
        try:
            spec.latent_shape(rule.num_frames or settings.num_frames, *(rule.size or (height, width)))
        except UserError as error:
            raise UserError(f"held_out: {error}") from None
    if settings.prompts.features is not None:
        TextFeatures(settings.prompts.features).encoder()  # raises on another program's file before anything is loaded
    if settings.prompts.file is not None:
        if spec.requires_image:
            raise UserError("prompts.file with an image-to-video model: a rollout needs first frames; give "
                            "prompts.cache (--cache DIR), made by lapwan cache with --i2v")
        prompts = read_prompts(settings.prompts.file)
        held = choose_held_out(prompts, rule.count, settings.held_out_seed)
        return SrpoData(
            tuple(p for p in prompts if p not in held), tuple(p for p in prompts if p in held),
            (settings.num_frames, height, width), False, settings.prompts.negative,
        )
    return _from_cache(settings, spec, (height, width))


def _from_cache(settings: SrpoSettings, spec: ModelSpec, size: tuple[int, int]) -> SrpoData:
    assert settings.prompts.cache is not None
    index = load_index(settings.prompts.cache)
    items = training_items(index, settings.prompts.split)
    check_cache(index, spec, items)
    if settings.rollout.offline or spec.requires_image:  # cached latents or first frames are used: their size decides
        sizes = sorted({(item.height, item.width) for item in items})
        if settings.size is not None and sizes != [settings.size]:
            have = ", ".join(f"{h}x{w}" for h, w in sizes)
            raise UserError(f"size = {size[0]}x{size[1]}, but {index.folder} holds clips of {have}; leave size out")
        size = sizes[0]
        shortest = min(item.frames for item in items)
        if shortest < settings.num_frames:
            raise UserError(f"num_frames = {settings.num_frames}, but {index.folder} holds clips of {shortest} frames; "
                            f"set num_frames to at most {shortest}")
    held = choose_held_out([item.caption for item in items], settings.held_out.count, settings.held_out_seed)
    trained = tuple(item for item in items if item.caption not in held)
    held_items: dict[str, CachedItem] = {}  # the first clip of each held-out caption
    for item in items:
        if item.caption in held:
            held_items.setdefault(item.caption, item)
    return SrpoData(
        tuple(item.caption for item in trained), tuple(held_items), (settings.num_frames, *size),
        settings.rollout.offline, settings.prompts.negative, index, trained, tuple(held_items.values()),
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class TextFeatures:
    """Text features [n tokens, D] of prompts, kept in the safetensors file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def encoder(self) -> str | None:
        """Identity of the text encoder that made the file; None if there is no file yet.

        Raises:
            UserError: a file of another kind, which writing would destroy.
        """
        if not self.path.exists():
            return None
        encoder = read_header(self.path).metadata.get(_ENCODER)
        if encoder is None:
            raise UserError(f"{self.path} holds no text features written by lapwan; set prompts.features to such a "
                            "file or to a new one, or leave it out")
        return encoder

    def ensure(self, prompts: Sequence[str], spec: ModelSpec, device: torch.device) -> None:
        """Encode the prompts that the file lacks; the text encoder is loaded only if there are any, then freed."""
        from lapwan.wan.text import encode_text, load_text_encoder

        encoder_id, features = text_encoder_fingerprint(spec), {}
        if (file_encoder := self.encoder()) == encoder_id:
            with safe_open(self.path, "pt") as file:
                features = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
        elif file_encoder is not None:
            console.warn(f"{self.path} was made by another text encoder; its prompts are encoded again")
        missing = [p for p in dict.fromkeys(prompts) if _hash(p) not in features]
        if not missing:
            return
        encoder = load_text_encoder(spec, device=device)
        with console.progress("captions", len(missing), "caption") as bar:
            for start in range(0, len(missing), _ENCODER_BATCH):
                part = missing[start : start + _ENCODER_BATCH]
                for prompt, feature in zip(part, encode_text(encoder, part), strict=True):
                    features[_hash(prompt)] = feature.cpu().contiguous()
                bar.advance(len(part))
        with files.atomic_file(self.path) as temporary:
            save_tensors(features, temporary, metadata={_ENCODER: encoder_id})

    def read(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features of prompts that `ensure` was given, on the CPU."""
        with safe_open(self.path, "pt") as file:
            return [file.get_tensor(_hash(prompt)) for prompt in prompts]


class PromptStore:
    """Batches of a run: prompts with zero latents, for a rollout to replace, or a cache's clips cut to `num_frames`."""

    def __init__(self, data: SrpoData, spec: ModelSpec, features: TextFeatures, device: torch.device) -> None:
        self._data, self._features, self._device, self._ids = data, features, device, data.ids
        self._shape = spec.latent_shape(*data.bucket)
        self._clips = None if data.index is None else ClipStore(data.index, data.items, device)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Samples by index, on the device. Latents that a rollout will make are zeros here."""
        if self._clips is not None:
            return self._cut(self._clips.batch(indices))
        captions = tuple(self._data.captions[i] for i in indices)
        return self._zeros(tuple(self._ids[i] for i in indices), captions, self._features.read(captions))

    def held_out(self) -> list[Batch]:
        """The held-out prompts in order, each as a batch of one."""
        if self._data.index is None:
            return [self._zeros((_hash(p),), (p,), self._features.read([p])) for p in self._data.held_out]
        store = ClipStore(self._data.index, self._data.held_items, self._device)
        return [self._cut(store.batch([i])) for i in range(len(self._data.held_items))]

    def negative(self) -> Tensor:
        """Features [n, D] of the negative prompt, on the device."""
        if self._data.index is not None:
            return read_prompt(self._data.index, "negative").to(self._device)
        return self._features.read([self._data.negative])[0].to(self._device)

    def _zeros(self, ids: tuple[str, ...], captions: tuple[str, ...], text: Sequence[Tensor]) -> Batch:
        false_B = torch.zeros(len(ids), dtype=torch.bool)
        latents = torch.zeros(len(ids), *self._shape)
        return Batch(ids, latents, tuple(text), None, None, false_B, None, captions).to(self._device)

    def _cut(self, batch: Batch) -> Batch:
        """Cut to the trained length: the VAE is causal, so a clip's first latent frames are those of its beginning."""
        frames = self._shape[1]
        condition = batch.condition_BCTHW
        condition = None if condition is None else condition[:, :, :frames]
        latents = batch.latents_BCTHW[:, :, :frames]
        if not self._data.offline and condition is None and latents.shape[1:] != self._shape:
            latents = latents.new_zeros(latents.shape[0], *self._shape)  # a rollout's size is free
        return replace(batch, latents_BCTHW=latents, condition_BCTHW=condition)


def check_negative(data: SrpoData, guidance: Sequence[float]) -> None:
    """Check that a cache has the negative prompt if any guidance is above 1.

    Raises:
        UserError: a cache without one.
    """
    if max(guidance) > 1 and data.index is not None:
        read_prompt(data.index, "negative")
