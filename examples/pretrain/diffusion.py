"""Train both noise experts on their own bands together with the text encoder, on latents encoded while it runs.

x_σ = σ·ε + (1 − σ)·x0, target v = ε − x0, L = Σ w·(v̂ − v)² / Σ w per clip, w = 1 + head_weight around the head.
Half of the samples of each noise expert have mask and image channels exactly zero: those are text-to-video, and its
patch embedding is the first 16 input channels of this one.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.pretrain.corpus import CAPTIONS, FRAMES, SIZE, Clips, sample
from examples.pretrain.settings import SEED, DiffusionSettings
from examples.pretrain.training import EmaWeights, box_mask, cosine, set_lr
from examples.pretrain.vae import to_pixels
from examples.pretrain.vae_forward import moments
from lapwan import console
from lapwan.losses.flow import add_noise, velocity_target
from lapwan.losses.sigmas import Shifted, Uniform, draw_in_band
from lapwan.models.spec import TEXT_LENGTH
from lapwan.names import NEGATIVE_PROMPT, NoiseExpert
from lapwan.tiny.model import TEXT, TRANSFORMER
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.image_condition import condition_video, with_mask
from lapwan.wan.text import clean_prompt
from lapwan.wan.transformer.block import BlockFunction, block_forward
from lapwan.wan.transformer.forward import ForwardOptions
from lapwan.wan.transformer.prompt import TextRows
from lapwan.wan.vae import normalise

TOKENS = 144  # the official negative prompt, the longest, has 139
LATENT = (16, 1 + (FRAMES - 1) // 4, SIZE // 8, SIZE // 8)
_EXTEND_EVERY, _LOG_EVERY, _COMPILED_AFTER = 50, 250, 3


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


def head_cells(boxes_BT4: Tensor) -> Tensor:
    """[B, latent frames, rows, columns]: 1 where the head's box lies in one of the frames that a cell covers."""
    mask = box_mask(boxes_BT4, LATENT[2], LATENT[3], 0.04)
    # A latent frame covers the first pixel frame, each later one four.
    later = torch.unflatten(mask[:, 1:], 1, (-1, 4)).amax(dim=2)
    return torch.cat([mask[:, :1], later], dim=1)


class Latents:
    """Encoded clips on the device, filled up in order as they are rendered."""

    def __init__(self, clips: Clips, vae: Any, tokens: TokenTable, device: torch.device) -> None:
        self._clips, self._vae, self._tokens, self._device = clips, vae, tokens, device
        shape = (clips.count, *LATENT)
        self.x0 = torch.empty(shape, dtype=torch.float16, device=device)
        self.image = torch.empty(shape, dtype=torch.float16, device=device)
        self.head = torch.empty((clips.count, *LATENT[1:]), dtype=torch.uint8, device=device)
        self.ids = torch.empty((clips.count, CAPTIONS, TOKENS), dtype=torch.int32, device=device)
        self.mask = torch.empty((clips.count, CAPTIONS, TOKENS), dtype=torch.uint8, device=device)
        self.encoded = 0

    @torch.no_grad()
    def extend(self, count: int) -> None:
        """Encode up to `count` clips in all, waiting for them where they are not rendered yet."""
        count = min(count, self._clips.count)
        self._clips.wait(count)
        for start in range(self.encoded, count, 64):
            stop = min(start + 64, count)
            pixels = to_pixels(torch.from_numpy(np.asarray(self._clips.frames[start:stop])).to(self._device))
            self.x0[start:stop] = normalise(self._vae, moments(self._vae, pixels)[0]).half()
            alone = condition_video(pixels[:, :, 0], FRAMES)
            self.image[start:stop] = normalise(self._vae, moments(self._vae, alone)[0]).half()
            boxes = torch.from_numpy(np.asarray(self._clips.boxes[start:stop])).to(self._device)
            self.head[start:stop] = head_cells(boxes).to(torch.uint8)
            texts = [text for i in range(start, stop) for text in sample(i, self._clips.purpose).captions]
            ids, masks = self._tokens(texts)
            self.ids[start:stop] = ids.view(stop - start, CAPTIONS, TOKENS).to(self.ids)
            self.mask[start:stop] = masks.view(stop - start, CAPTIONS, TOKENS).to(self.mask)
        self.encoded = max(self.encoded, count)


@dataclass
class Models:
    """What is trained here."""

    noise_experts: dict[NoiseExpert, WanBackbone]
    text: Any

    def modules(self) -> nn.ModuleList:
        return nn.ModuleList([*(backbone.transformer for backbone in self.noise_experts.values()), self.text])


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


def new_models(vocabulary: int, device: torch.device, block: BlockFunction = block_forward) -> Models:
    """Untrained, on `device`; the output starts at zero."""
    from diffusers import WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(SEED + 1)
    transformers = {e: WanTransformer3DModel(in_channels=36, **TRANSFORMER) for e in NoiseExpert}
    for model in transformers.values():
        nn.init.zeros_(model.proj_out.weight)
        nn.init.zeros_(model.proj_out.bias)
    text = UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, dropout_rate=0.0, **TEXT))
    nn.init.normal_(text.shared.weight, std=0.5)
    backbones = {e: WanBackbone(model.to(device), ForwardOptions(block=block)) for e, model in transformers.items()}
    models = Models(backbones, text.to(device))
    models.modules().requires_grad_(True).train()
    return models


class _Draws:
    """Everything random of a step, on the device."""

    def __init__(self, latents: Latents, tokens: TokenTable, settings: DiffusionSettings, device: torch.device) -> None:
        self._latents, self._settings, self._device = latents, settings, device
        self._generator = torch.Generator(device).manual_seed(SEED)
        ids, mask = tokens(["", NEGATIVE_PROMPT])
        self._plain = ids.to(device), mask.to(device)

    def uniform(self) -> Tensor:
        return torch.rand(self._settings.batch, device=self._device, generator=self._generator)

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, device=self._device, generator=self._generator)

    def integers(self, below: int) -> Tensor:
        return (self.uniform().double() * below).long().clamp_max(below - 1)

    def captions(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, TOKENS] of one of each clip's captions, some dropped."""
        which = self.integers(CAPTIONS)
        ids, mask = self._latents.ids[chosen, which].long(), self._latents.mask[chosen, which].long()
        u, drop = self.uniform(), self._settings.caption_dropout
        for row, (low, high) in enumerate(((0.0, drop / 2), (drop / 2, drop))):
            here = ((u >= low) & (u < high))[:, None]
            ids = torch.where(here, self._plain[0][row], ids)
            mask = torch.where(here, self._plain[1][row], mask)
        return ids, mask

    def sigma(self, noise_expert: NoiseExpert) -> Tensor:
        low, high = self._settings.bands[noise_expert.value]
        sampler = Uniform() if noise_expert is NoiseExpert.HIGH else Shifted(Uniform(), self._settings.low_shift)
        return draw_in_band(sampler, self.uniform(), low, high).float()


def _build_optimizer(models: Models, settings: DiffusionSettings, fused: bool) -> torch.optim.Optimizer:
    weights = [p for b in models.noise_experts.values() for p in b.transformer.parameters()]
    groups = [
        {"params": [p for p in weights if p.dim() > 1], "base_lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": [p for p in weights if p.dim() <= 1], "base_lr": settings.lr, "weight_decay": 0.0},
        {"params": list(models.text.parameters()), "base_lr": settings.text_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=fused)


def train_diffusion(
    clips: Clips, vae: Any, settings: DiffusionSettings, device: torch.device, compiled: bool,
    start: Models | None = None, seconds: float | None = None,
) -> Models:
    """Both noise experts and the text encoder with averaged weights, in eval mode, on `device`.

    Args:
        start: weights to go on from; None: untrained ones.
        seconds: as many seconds after the third step, when all is compiled, take the part of `settings.steps`.
    """
    tokens = TokenTable()
    block = bf16_block if device.type == "cuda" else block_forward
    models = new_models(tokens.size, device, torch.compile(block, dynamic=False) if compiled else block)
    if start is not None:
        models.modules().load_state_dict(start.modules().state_dict())
    latents = Latents(clips, vae, tokens, device)
    draws = _Draws(latents, tokens, settings, device)
    optimizer = _build_optimizer(models, settings, device.type == "cuda")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average = EmaWeights(models.modules(), settings.ema)
    started, sums, count = time.monotonic(), torch.zeros(3, device=device), 0
    compiled_at, at = started, 0
    for step in range(settings.steps):
        if step == _COMPILED_AFTER:
            compiled_at = time.monotonic()
        if seconds is None:
            at = step
        elif step >= _COMPILED_AFTER:
            at = int(settings.steps * (time.monotonic() - compiled_at) / seconds)
        if at >= settings.steps:
            break
        if step % _EXTEND_EVERY == 0:
            latents.extend(settings.first_clips + int(at * settings.clips_per_step))
        set_lr(optimizer, cosine(at, settings.steps, settings.warmup))
        chosen = draws.integers(latents.encoded)
        ids, mask = draws.captions(chosen)
        x0, image = latents.x0[chosen].float(), latents.image[chosen].float()
        weight = 1 + settings.head_weight * latents.head[chosen].float()
        losses = []
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = models.text(ids, mask).last_hidden_state.float()
        text = text_rows(hidden, mask)
        for noise_expert, backbone in models.noise_experts.items():
            sigma, noise = draws.sigma(noise_expert), draws.noise(x0)
            keep = (draws.uniform() >= settings.condition_dropout).float().view(-1, 1, 1, 1, 1)
            v = backbone.velocity(add_noise(x0, noise, sigma), 1000 * sigma, text, keep * with_mask(image))
            error = (v - velocity_target(x0, noise)).square().mean(dim=1)
            losses.append((weight * error).sum() / weight.sum())
        loss = losses[0] + losses[1]
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        sums, count = sums + torch.stack([*(x.detach() for x in losses), norm.detach()]), count + 1
        if (step + 1) % min(_LOG_EVERY, max(settings.steps // 4, 1)) == 0 or step + 1 == settings.steps:
            high, low, gradient = (sums / count).tolist()
            console.log(f"diffusion step {step + 1} loss high {high:.4f} low {low:.4f} gradient {gradient:.3f}, clips "
                        f"{latents.encoded} of {clips.ready()}, {time.monotonic() - started:.0f} s")
            sums, count = torch.zeros(3, device=device), 0
    average.copy_to_parameters()
    models.modules().requires_grad_(False).eval()
    return models
