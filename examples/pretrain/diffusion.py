"""Train noise experts on their own bands, A14B's together with the text encoder, on latents encoded while it runs.

x_σ = σ·ε + (1 − σ)·x0, target v = ε − x0, L = Σ w·(v̂ − v)² / Σ w per clip, w = 1 + head_weight around the head.
Half of the samples of each noise expert are text-to-video. A14B's then have mask and image channels exactly zero, and
its text-to-video patch embedding is the first 16 input channels of this one. The other samples of TI2V-5B have the
first latent frame clean, at timestep 0, which counts no loss.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.pretrain.corpus import CAPTIONS, FRAMES, MIRRORS, Clips, Purpose, sample
from examples.pretrain.settings import SEED, Recipe
from examples.pretrain.training import Checkpoints, EmaWeights, Schedule, box_mask, set_lr
from examples.pretrain.vae import to_pixels
from examples.pretrain.vae_forward import moments
from lapwan import console
from lapwan.losses.flow import add_noise, velocity_target
from lapwan.losses.sigmas import Shifted, Uniform, draw_in_band
from lapwan.models.spec import TEXT_LENGTH
from lapwan.names import NEGATIVE_PROMPT, NoiseExpert
from lapwan.tiny.model import TEXT, load_text_encoder
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.image_condition import condition_video, with_first_frame, with_mask
from lapwan.wan.text import clean_prompt
from lapwan.wan.transformer.block import BlockFunction, block_forward
from lapwan.wan.transformer.forward import ForwardOptions, first_frame_times
from lapwan.wan.transformer.prompt import TextRows
from lapwan.wan.vae import normalise

TOKENS = 144  # the official negative prompt, the longest, has 139
LATENT_FRAMES = 1 + (FRAMES - 1) // 4
PAD_ID = 0
_EXTEND_EVERY, _LOG_EVERY = 50, 250
_CHUNK = 64  # clips and mirror images that are encoded at a time


class TokenTable:
    """Captions as ids and mask [n, TOKENS]."""

    def __init__(self) -> None:
        from lapwan.tiny.model import make_tokenizer

        self._tokenizer = make_tokenizer()
        self.size = len(self._tokenizer)

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        encoded = self._tokenizer([clean_prompt(text) for text in captions], padding="max_length", max_length=TOKENS,
                                  truncation=True, return_tensors="pt")
        return encoded.input_ids, encoded.attention_mask


def head_cells(boxes_BT4: Tensor, rows: int, columns: int) -> Tensor:
    """[B, latent frames, rows, columns]: 1 where the head's box lies in one of the frames that a cell covers."""
    mask = box_mask(boxes_BT4, rows, columns, 0.04)
    # A latent frame covers the first pixel frame, each later one four.
    later = torch.unflatten(mask[:, 1:], 1, (-1, 4)).amax(dim=2)
    return torch.cat([mask[:, :1], later], dim=1)


class Tokens:
    """The captions of all clips and mirror images as ids, in a file that another process fills: [N, M, captions, L]."""

    def __init__(self, folder: Path, purpose: Purpose, clips: int, mirrors: int) -> None:
        self.folder, self.purpose, self.clips, self.mirrors = folder, purpose, clips, mirrors
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {"ids": (clips, mirrors, CAPTIONS, TOKENS), "done": (1,)}
        files = {name: folder / f"{purpose}_tokens_{name}.bin" for name in shapes}
        self.ids, self._done = (
            np.memmap(files[name], dtype, "r+" if files[name].exists() else "w+", shape=shapes[name])
            for name, dtype in (("ids", np.uint16), ("done", np.int64)))

    def fill(self) -> None:
        """Draw and encode the captions, in order."""
        table = TokenTable()
        for start in range(int(self._done[0]), self.clips, 64):
            stop = min(start + 64, self.clips)
            samples = [sample(i, self.purpose, m) for i in range(start, stop) for m in range(self.mirrors)]
            texts = [text for shown in samples for text in shown.captions]
            ids, _ = table(texts)
            self.ids[start:stop] = ids.view(stop - start, self.mirrors, CAPTIONS, TOKENS).numpy()
            self._done[0] = stop

    def wait(self, clips: int) -> None:
        """Return once the captions of the first `clips` clips are there."""
        while self._done[0] < clips:
            time.sleep(0.05)


def _fill_tokens(folder: Path, purpose: Purpose, clips: int, mirrors: int) -> None:
    Tokens(folder, purpose, clips, mirrors).fill()


def start_tokens(folder: Path, purpose: Purpose, clips: int, mirrors: int) -> Tokens:
    """Encode all captions in a process of its own."""
    tokens = Tokens(folder, purpose, clips, mirrors)
    context = multiprocessing.get_context("spawn")
    context.Process(target=_fill_tokens, args=(folder, purpose, clips, mirrors), daemon=True).start()
    return tokens


class Latents:
    """Encoded clips and their mirror images on the device, filled up in order as they are rendered."""

    def __init__(self, clips: Clips, vae: Any, tokens: Tokens, recipe: Recipe, device: torch.device) -> None:
        self._clips, self._vae, self._tokens, self._recipe, self._device = clips, vae, tokens, recipe, device
        self._mirrors = recipe.diffusion.mirrors
        self._bf16 = recipe.diffusion.bf16_latents and device.type == "cuda"
        count, shape = clips.count * self._mirrors, latent_shape(recipe)
        self.x0 = torch.empty((count, *shape), dtype=torch.float16, device=device)
        image = () if recipe.clean_first_frame else (count, *shape)  # else the first frame of x0
        self.image = torch.empty(image, dtype=torch.float16, device=device)
        self.head = torch.empty((count, *shape[1:]), dtype=torch.uint8, device=device)
        self.ids = torch.empty((count, CAPTIONS, TOKENS), dtype=torch.int32, device=device)
        self.encoded = 0  # clips; each has its mirror images

    def __len__(self) -> int:
        return self.encoded * self._mirrors

    @torch.no_grad()
    def extend(self, clips: int) -> None:
        """Encode up to `clips` clips in all, waiting for them where they are not rendered yet."""
        clips = min(clips, self._clips.count)
        self._clips.wait(clips)
        self._tokens.wait(clips)
        for start in range(self.encoded, clips, _CHUNK // self._mirrors):
            stop = min(start + _CHUNK // self._mirrors, clips)
            rows = slice(start * self._mirrors, stop * self._mirrors)
            frames = torch.from_numpy(np.asarray(self._clips.frames[start:stop])).to(self._device)
            boxes = torch.from_numpy(np.asarray(self._clips.boxes[start:stop])).to(self._device)
            pixels, boxes = _mirror_images(to_pixels(frames), boxes, self._mirrors)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                raw = moments(self._vae, pixels)[0].float()
            self.x0[rows] = normalise(self._vae, raw).half()
            if not self._recipe.clean_first_frame:
                alone = condition_video(pixels[:, :, 0], FRAMES)
                self.image[rows] = normalise(self._vae, moments(self._vae, alone)[0]).half()
            self.head[rows] = head_cells(boxes, *self.head.shape[2:]).to(torch.uint8)
            ids = torch.from_numpy(self._tokens.ids[start:stop].astype(np.int32))
            self.ids[rows] = ids.flatten(0, 1).to(self._device)
        self.encoded = max(self.encoded, clips)


def _mirror_images(pixels_BCTHW: Tensor, boxes_BT4: Tensor, mirrors: int) -> tuple[Tensor, Tensor]:
    """Each clip followed by its mirror images, with the boxes around the head."""
    all_pixels, all_boxes = [], []
    for axes in MIRRORS[:mirrors]:
        pixels, boxes = pixels_BCTHW, boxes_BT4
        for axis, dim, (low, high) in (("width", -1, (0, 2)), ("height", -2, (1, 3))):
            if axis in axes:
                pixels, boxes = pixels.flip(dim), boxes.clone()
                boxes[..., low], boxes[..., high] = 1 - boxes[..., high], 1 - boxes[..., low]
        all_pixels.append(pixels)
        all_boxes.append(boxes)
    return torch.stack(all_pixels, dim=1).flatten(0, 1), torch.stack(all_boxes, dim=1).flatten(0, 1)


def latent_shape(recipe: Recipe) -> tuple[int, int, int, int]:
    """(channels, frames, height, width) of a clip's latents."""
    side = recipe.size // int(recipe.parts.vae.get("scale_factor_spatial", 8))
    return recipe.parts.latent_channels, LATENT_FRAMES, side, side


@dataclass
class Models:
    """What is trained here."""

    recipe: Recipe
    noise_experts: dict[NoiseExpert, WanBackbone]
    text: Any

    def modules(self) -> nn.ModuleList:
        return nn.ModuleList([*(backbone.transformer for backbone in self.noise_experts.values()), self.text])

    def velocity(
        self, noise_expert: NoiseExpert, x_BCTHW: Tensor, sigma_B: Tensor, text: TextRows, image_BCTHW: Tensor | None,
        keep_B: Tensor | None = None,
    ) -> Tensor:
        """v̂ at sigma, from the image's latents where `keep` is 1 (everywhere without it), else from text alone."""
        backbone, timestep = self.noise_experts[noise_expert], 1000 * sigma_B
        keep = torch.ones_like(sigma_B) if keep_B is None else keep_B
        if self.recipe.clean_first_frame:
            if image_BCTHW is None:
                return backbone.velocity(x_BCTHW, timestep, text)
            clean_B, patch = keep > 0, backbone.transformer.config.patch_size
            times = first_frame_times(timestep, clean_B, x_BCTHW.shape[2:], patch)
            return backbone.velocity(with_first_frame(x_BCTHW, image_BCTHW[:, :, :1], clean_B), times, text)
        extra = x_BCTHW.new_zeros(len(x_BCTHW), 20, *x_BCTHW.shape[2:])
        if image_BCTHW is not None:
            extra = keep.view(-1, 1, 1, 1, 1) * with_mask(image_BCTHW)
        return backbone.velocity(x_BCTHW, timestep, text, extra)


def text_rows(hidden_BLD: Tensor, mask_BL: Tensor) -> TextRows:
    """Features with their padding zeroed, and one zero row that represents all rows up to 512."""
    mask = mask_BL.bool()
    text = torch.where(mask[..., None], hidden_BLD, 0.0)
    count = torch.log((TEXT_LENGTH - mask.sum(dim=1)).to(text.dtype))
    bias = torch.zeros_like(text[..., 0]).masked_fill(~mask, -math.inf)
    return TextRows(F.pad(text, (0, 0, 0, 1)), torch.cat([bias, count[:, None]], dim=1)[:, None, None])


def bf16_block(*inputs: Any) -> Tensor:
    """A block whose products and attention are in bf16; the weights and the residual stream stay in fp32."""
    with torch.autocast("cuda", torch.bfloat16):
        return block_forward(*inputs)


def new_models(
    recipe: Recipe, vocabulary: int, device: torch.device, block: BlockFunction = block_forward
) -> Models:
    """Untrained, on `device`; the output starts at zero. Where the text encoder is not trained: the shipped one."""
    from diffusers import WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(SEED + 1)
    parts = recipe.parts
    transformers = {e: WanTransformer3DModel(in_channels=recipe.in_channels, **parts.transformer)
                    for e in parts.transformer_files}
    for model in transformers.values():
        nn.init.zeros_(model.proj_out.weight)
        nn.init.zeros_(model.proj_out.bias)
    if recipe.diffusion.train_text:
        text = UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, dropout_rate=0.0, **TEXT))
        nn.init.normal_(text.shared.weight, std=0.5)
    else:
        text = load_text_encoder(vocabulary)
    backbones = {e: WanBackbone(model.to(device), ForwardOptions(block=block)) for e, model in transformers.items()}
    models = Models(recipe, backbones, text.to(device))
    models.modules().requires_grad_(True).train()
    if not recipe.diffusion.train_text:
        text.requires_grad_(False).eval()
    return models


class _Draws:
    """Everything random of a step, on the device."""

    def __init__(self, latents: Latents, recipe: Recipe, device: torch.device) -> None:
        self._latents, self._settings, self._device = latents, recipe.diffusion, device
        self._generator = torch.Generator(device).manual_seed(SEED)
        ids, _ = TokenTable()(["", NEGATIVE_PROMPT])
        self._plain = ids.to(device)

    def uniform(self) -> Tensor:
        return torch.rand(self._settings.batch, device=self._device, generator=self._generator)

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, device=self._device, generator=self._generator)

    def integers(self, below: int) -> Tensor:
        return (self.uniform().double() * below).long().clamp_max(below - 1)

    def captions(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, TOKENS] of one of each clip's captions, some dropped."""
        which = self.integers(CAPTIONS)
        ids = self._latents.ids[chosen, which].long()
        u, drop = self.uniform(), self._settings.caption_dropout
        for row, (low, high) in enumerate(((0.0, drop / 2), (drop / 2, drop))):
            ids = torch.where(((u >= low) & (u < high))[:, None], self._plain[row], ids)
        return ids, (ids != PAD_ID).long()

    def sigma(self, noise_expert: NoiseExpert) -> Tensor:
        low, high = self._settings.bands[noise_expert.value]
        sampler = Shifted(Uniform(), self._settings.shifts[noise_expert.value])
        return draw_in_band(sampler, self.uniform(), low, high).float()


def _build_optimizer(models: Models, fused: bool) -> torch.optim.Optimizer:
    settings = models.recipe.diffusion
    weights = [p for b in models.noise_experts.values() for p in b.transformer.parameters()]
    groups = [
        {"params": [p for p in weights if p.dim() > 1], "base_lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": [p for p in weights if p.dim() <= 1], "base_lr": settings.lr, "weight_decay": 0.0},
    ]
    if settings.train_text:
        groups.append({"params": list(models.text.parameters()), "base_lr": settings.text_lr, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=fused)


def _hidden(models: Models, ids: Tensor, mask: Tensor) -> Tensor:
    with (torch.set_grad_enabled(models.recipe.diffusion.train_text),
          torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda")):
        hidden: Tensor = models.text(ids, mask).last_hidden_state.float()
    return hidden


def _losses(models: Models, latents: Latents, draws: _Draws) -> list[Tensor]:
    """One of each noise expert, on the same clips and captions."""
    settings = models.recipe.diffusion
    chosen = draws.integers(len(latents))
    ids, mask = draws.captions(chosen)
    x0 = latents.x0[chosen].float()
    image = x0 if models.recipe.clean_first_frame else latents.image[chosen].float()
    weight = 1 + settings.head_weight * latents.head[chosen].float()
    text = text_rows(_hidden(models, ids, mask), mask)
    losses = []
    for noise_expert in models.noise_experts:
        sigma, noise = draws.sigma(noise_expert), draws.noise(x0)
        keep = (draws.uniform() >= settings.condition_dropout).float()
        v = models.velocity(noise_expert, add_noise(x0, noise, sigma), sigma, text, image, keep)
        error = (v - velocity_target(x0, noise)).square().mean(dim=1)
        counted = weight
        if models.recipe.clean_first_frame:
            counted = torch.cat([weight[:, :1] * (1 - keep.view(-1, 1, 1, 1)), weight[:, 1:]], dim=1)
        losses.append((counted * error).sum() / counted.sum())
    return losses


def _block(recipe: Recipe, device: torch.device, compiled: bool) -> BlockFunction:
    block: Callable[..., Tensor] = bf16_block if device.type == "cuda" else block_forward
    return torch.compile(block, dynamic=False) if compiled else block


def train_diffusion(
    clips: Clips, vae: Any, tokens: Tokens, recipe: Recipe, device: torch.device, compiled: bool,
    seconds: float | None = None, first: Callable[[Models], None] | None = None,
    save: Callable[[Models], None] | None = None,
) -> Models:
    """Noise experts (and text encoder) with averaged weights, in eval mode, on `device`.

    Args:
        seconds: how long; None: the settings' steps.
        first: called with the untrained models, to go on from others.
        save: called with the averaged models every minute.
    """
    settings = recipe.diffusion
    models = new_models(recipe, TokenTable().size, device, _block(recipe, device, compiled))
    if first is not None:
        first(models)
    latents = Latents(clips, vae, tokens, recipe, device)
    draws = _Draws(latents, recipe, device)
    optimizer = _build_optimizer(models, device.type == "cuda")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average = EmaWeights(models.modules(), settings.ema)
    checkpoints = Checkpoints(None if save is None else lambda: save(models))
    schedule, sums, count = Schedule(settings.steps, settings.warmup, seconds), torch.zeros(3, device=device), 0
    for step in schedule.numbers():
        if step % _EXTEND_EVERY == 0:
            planned = settings.first_clips + int(step * settings.clips_per_step)
            rendered = clips.ready() // _CHUNK * _CHUNK
            latents.extend(planned if seconds is None else max(settings.first_clips, rendered))
        set_lr(optimizer, schedule.lr(step))
        losses = _losses(models, latents, draws)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        checkpoints.after_step(average)
        both = torch.stack([losses[0].detach(), losses[-1].detach(), norm.detach()])
        sums, count = sums + both, count + 1
        if (step + 1) % min(_LOG_EVERY, max(settings.steps // 4, 1)) == 0 or schedule.progress(step + 1) >= 1:
            high, low, gradient = (sums / count).tolist()
            text = f"high {high:.4f} low {low:.4f}" if len(losses) > 1 else f"{high:.4f}"
            console.log(f"diffusion step {step + 1} loss {text} gradient {gradient:.3f}, clips "
                        f"{latents.encoded} of {clips.ready()}, {schedule.elapsed():.0f} s")
            sums, count = torch.zeros(3, device=device), 0
    average.copy_to_parameters()
    models.modules().requires_grad_(False).eval()
    for backbone in models.noise_experts.values():
        backbone.options.block = block_forward
    return models
