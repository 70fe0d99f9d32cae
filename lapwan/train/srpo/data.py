"""What preference alignment trains on: prompts with their text features, or a cache's clips.

Text features are encoded once and kept in one safetensors file, a tensor a prompt, named by the prompt's hash; a prompt
that the file has is never encoded again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lapwan import console, files
from lapwan.caching.batch import Batch
from lapwan.caching.index import CachedItem, CacheIndex
from lapwan.caching.read import load_index, read_prompt
from lapwan.checkpoints.container import read_header
from lapwan.data.prompts import held_out, read_prompts
from lapwan.errors import UserError
from lapwan.models.fingerprints import text_identity
from lapwan.models.spec import ModelSpec
from lapwan.settings.srpo import SrpoSettings
from lapwan.train.clip_store import ClipStore, check_cache, training_items

FEATURES_FILE = "text_features.safetensors"
_AT_ONCE = 16  # prompts in one pass of the text encoder
_ENCODER = "lapwan.text_encoder"


@dataclass(frozen=True)
class SrpoData:
    """Captions to train on and held-out ones, and the cache they come from if they do.

    `bucket` is (frames, height, width) of what is trained; `items` and `held_items` are the cache's.
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
        """What the draws are keyed by: a clip's id, or a prompt's hash, which its place in the file does not change."""
        return [item.id for item in self.items] or [_hash(caption) for caption in self.captions]

    @property
    def identity(self) -> dict[str, str]:
        """The prompts by content, and a cache's clips by theirs."""
        told = [[i.id, i.bucket, i.caption, i.repeats, i.fingerprints] for i in (*self.items, *self.held_items)]
        text = json.dumps([self.captions, self.held_out, self.negative, told], sort_keys=True)
        return {"prompts": hashlib.sha256(text.encode()).hexdigest()}


def read_data(settings: SrpoSettings, spec: ModelSpec) -> SrpoData:
    """Read the prompts or the cache's index, split off the held-out prompts, and check both against the model.

    Raises:
        UserError: what cannot be trained on, in one line.
    """
    height, width = settings.size or spec.defaults.size
    spec.latent_shape(settings.num_frames, height, width)  # refuses odd sizes and lengths
    if spec.task == "i2v" and settings.num_frames == 1:
        raise UserError("num_frames = 1 on an image-to-video model: its one frame is the image it is given, so nothing "
                        "is left to align; set num_frames to a video's (4N+1), or take a text-to-video model")
    rule = settings.held_out
    if spec.task == "i2v" and (rule.size is not None or rule.num_frames is not None):
        raise UserError("held_out.size and held_out.num_frames are for text-to-video models; an image-to-video model's "
                        "held-out clips keep the size of their first frame")
    if rule.count and (rule.size is not None or rule.num_frames is not None):
        try:
            spec.latent_shape(rule.num_frames or settings.num_frames, *(rule.size or (height, width)))
        except UserError as error:
            raise UserError(f"held_out: {error}") from None
    if settings.prompts.features is not None:
        TextFeatures(settings.prompts.features).encoder()  # refuses another program's file before anything is loaded
    if settings.prompts.file is not None:
        if spec.task == "i2v":
            raise UserError("prompts.file with an image-to-video model: a rollout needs first frames; give "
                            "prompts.cache (--cache DIR), made by lapwan cache with --i2v")
        prompts = read_prompts(settings.prompts.file)
        apart = held_out(prompts, rule.count, settings.held_out_seed)
        return SrpoData(
            tuple(p for p in prompts if p not in apart), tuple(p for p in prompts if p in apart),
            (settings.num_frames, height, width), False, settings.prompts.negative,
        )
    return _from_cache(settings, spec, (height, width))


def _from_cache(settings: SrpoSettings, spec: ModelSpec, size: tuple[int, int]) -> SrpoData:
    assert settings.prompts.cache is not None
    index = load_index(settings.prompts.cache)
    items = training_items(index, settings.prompts.split)
    check_cache(index, spec, items)
    bound = settings.rollout.offline or spec.task == "i2v"
    if bound:  # the size is the cache's
        sizes = sorted({(item.height, item.width) for item in items})
        if settings.size is not None and sizes != [settings.size]:
            found = ", ".join(f"{h}x{w}" for h, w in sizes)
            raise UserError(f"size = {size[0]}x{size[1]}, but {index.folder} holds clips of {found}; leave size out")
        size = sizes[0]
        short = min(item.frames for item in items)
        if short < settings.num_frames:
            raise UserError(f"num_frames = {settings.num_frames}, but {index.folder} holds clips of {short} frames; "
                            f"set num_frames to at most {short}")
    apart = held_out([item.caption for item in items], settings.held_out.count, settings.held_out_seed)
    kept = tuple(item for item in items if item.caption not in apart)
    first: dict[str, CachedItem] = {}
    for item in items:
        if item.caption in apart:
            first.setdefault(item.caption, item)
    return SrpoData(
        tuple(item.caption for item in kept), tuple(first), (settings.num_frames, *size), settings.rollout.offline,
        settings.prompts.negative, index, kept, tuple(first.values()),
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class TextFeatures:
    """Features [n, D] by prompt, from the file that keeps them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def encoder(self) -> str | None:
        """Which text encoder the file's features are of; None if there is no file yet.

        Raises:
            UserError: a file of something else, which writing would destroy.
        """
        if not self.path.exists():
            return None
        found = read_header(self.path).metadata.get(_ENCODER)
        if found is None:
            raise UserError(f"{self.path} holds no text features of lapwan's; set prompts.features to a file that it "
                            "wrote or may write, or leave it out")
        return found

    def ensure(self, prompts: Sequence[str], spec: ModelSpec, device: torch.device) -> None:
        """Encode what the file lacks; the text encoder is loaded only then, and leaves."""
        from lapwan.wan.text import encode_text, load_text_encoder

        encoder_id, have = text_identity(spec), {}
        if (found := self.encoder()) == encoder_id:
            with safe_open(self.path, "pt") as file:
                have = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
        elif found is not None:
            console.warn(f"{self.path} is of another text encoder; its prompts are encoded again")
        missing = [p for p in dict.fromkeys(prompts) if _hash(p) not in have]
        if not missing:
            return
        encoder = load_text_encoder(spec, device=device)
        with console.progress("captions", len(missing), "caption") as bar:
            for start in range(0, len(missing), _AT_ONCE):
                part = missing[start : start + _AT_ONCE]
                for prompt, feature in zip(part, encode_text(encoder, part), strict=True):
                    have[_hash(prompt)] = feature.cpu().contiguous()
                bar.advance(len(part))
        with files.atomic_file(self.path) as temporary:
            save_file(have, temporary, metadata={_ENCODER: encoder_id})

    def read(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features of prompts that `ensure` has seen, on the CPU."""
        with safe_open(self.path, "pt") as file:
            return [file.get_tensor(_hash(prompt)) for prompt in prompts]


class PromptStore:
    """Batches of a run: prompts with room for a rollout's latents, or a cache's clips cut to the trained length."""

    def __init__(self, data: SrpoData, spec: ModelSpec, features: TextFeatures, device: torch.device) -> None:
        self._data, self._features, self._device, self._ids = data, features, device, data.ids
        self._shape = spec.latent_shape(*data.bucket)
        self._clips = None if data.index is None else ClipStore(data.index, data.items, device)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Samples by index, on the device. Latents that a rollout will make are zeros here."""
        if self._clips is not None:
            return self._fitted(self._clips.batch(indices))
        captions = tuple(self._data.captions[i] for i in indices)
        return self._empty(tuple(self._ids[i] for i in indices), captions, self._features.read(captions))

    def held_out(self) -> list[Batch]:
        """The held-out prompts, one a batch, in order."""
        if self._data.index is None:
            return [self._empty((_hash(p),), (p,), self._features.read([p])) for p in self._data.held_out]
        store = ClipStore(self._data.index, self._data.held_items, self._device)
        return [self._fitted(store.batch([i])) for i in range(len(self._data.held_items))]

    def negative(self) -> Tensor:
        """Features [n, D] of the negative prompt, on the device."""
        if self._data.index is not None:
            return read_prompt(self._data.index, "negative").to(self._device)
        return self._features.read([self._data.negative])[0].to(self._device)

    def _empty(self, ids: tuple[str, ...], captions: tuple[str, ...], text: Sequence[Tensor]) -> Batch:
        nothing_B = torch.zeros(len(ids), dtype=torch.bool)
        latents = torch.zeros(len(ids), *self._shape)
        return Batch(ids, latents, tuple(text), None, None, nothing_B, None, nothing_B, captions).to(self._device)

    def _fitted(self, batch: Batch) -> Batch:
        """Cut to the trained length: the VAE is causal, so a clip's first latent frames are those of its beginning."""
        frames = self._shape[1]
        condition = batch.condition_BCTHW
        condition = None if condition is None else condition[:, :, :frames]
        latents = batch.latents_BCTHW[:, :, :frames]
        if not self._data.offline and condition is None and latents.shape[1:] != self._shape:
            latents = latents.new_zeros(latents.shape[0], *self._shape)  # a rollout is of any size
        return replace(batch, latents_BCTHW=latents, condition_BCTHW=condition)


def negative_needed(data: SrpoData, guidance: Sequence[float]) -> bool:
    """Whether the negative prompt is evaluated; says so early where a cache has none."""
    if max(guidance) <= 1:
        return False
    if data.index is not None:
        read_prompt(data.index, "negative")
    return True

