"""Train the autoencoder: crops around the instrument's head, its pixels weighted, every third step whole clips.

L = Σ w·(|x̂ − x| + λ_2·|x̂ − x|² + λ_edge·|∇x̂ − ∇x|) / Σ w + λ_KL·KL, w = 1 + head_weight inside the box around the head.
Without the weight the background fills the mean and the heads, which tell the instruments apart, blur away.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from examples.pretrain.corpus import FRAMES, Clips
from examples.pretrain.settings import SEED, VaeSettings
from examples.pretrain.training import Checkpoints, EmaWeights, Schedule, box_mask, prefetch, set_lr
from examples.pretrain.vae_forward import moments, reconstruct
from lapwan import console
from lapwan.tiny.model import EmbeddedParts

_LOG_EVERY = 200


def new_vae(parts: EmbeddedParts) -> Any:
    """The untrained autoencoder."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(SEED)
    channels = parts.latent_channels
    vae = AutoencoderKLWan(**parts.vae, latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    _init_vae_weights(vae)
    return vae


@torch.no_grad()
def _init_vae_weights(vae: Any) -> None:
    """Initial weights under which a picture reaches the output.

    With PyTorch's own the biases drown what differs between pictures, the decoder learns the mean picture, and stays
    there. Here: no biases, unit gain, weak residual branches, time convolutions near the identity, and latents that
    start nearly without noise.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        kind = type(module).__name__
        if kind == "WanResidualBlock":
            module.conv2.weight.mul_(0.3)
        elif kind == "WanAttentionBlock":
            module.proj.weight.mul_(0.3)
        elif kind == "WanResample" and module.mode.endswith("3d"):
            weight = module.time_conv.weight
            weight.mul_(0.3)
            for row in range(len(weight)):
                weight[row, row % weight.shape[1], -1] += 1.0
    vae.quant_conv.bias[vae.config.z_dim:].fill_(-6.0)


def _weights(boxes_BT4: Tensor, corner_B2: Tensor, size: int, crop: int, extra: float) -> Tensor:
    """1 + extra inside the head's box, over a crop whose corner (x, y) is given in pixels: [B, 1, T, H, W]."""
    corner = (corner_B2 / size).repeat(1, 2)[:, None]
    return 1 + extra * box_mask((boxes_BT4 - corner) * (size / crop), crop, crop)[:, None]


def _batch(clips: Clips, settings: VaeSettings, timed: bool, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 pixels [B, T, h, w, 3], boxes [B, T, 4], corners [B, 2] (x, y)."""
    rng = np.random.default_rng([SEED, step])
    planned = settings.first_clips + int(step * settings.clips_per_step)
    available = min(clips.count, max(settings.first_clips, clips.ready()) if timed else planned)
    clips.wait(available)
    whole = step % settings.whole_every == 0
    chosen = rng.integers(available, size=settings.whole_batch if whole else settings.batch)
    crop = clips.size if whole else settings.crop
    frames, corners = [], []
    for index in chosen:
        # A crop lies around the head in one of the frames; the head may leave it in others, as it does in whole clips.
        box = clips.boxes[index][rng.integers(FRAMES)]
        middle = clips.size * ((box[:2] + box[2:]) / 2 + rng.uniform(-1, 1, 2) / 12)
        x, y = np.clip(middle - crop / 2, 0, clips.size - crop).astype(int)
        frames.append(clips.frames[index][:, y:y + crop, x:x + crop])
        corners.append((x, y))
    boxes = torch.from_numpy(np.asarray(clips.boxes[chosen]))
    return torch.from_numpy(np.stack(frames)), boxes, torch.tensor(corners, dtype=torch.float32)


def to_pixels(frames_BTHWC: Tensor) -> Tensor:
    """uint8 -> [-1, 1], [B, 3, T, H, W]."""
    return frames_BTHWC.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def _loss(
    vae: Any, pixels: Tensor, weight: Tensor, settings: VaeSettings, noise: Tensor, edge_weight: Tensor
) -> tuple[Tensor, Tensor]:
    mean, log_variance = moments(vae, pixels)
    mean, log_variance = mean.float(), log_variance.float()
    raw = mean + torch.exp(0.5 * log_variance) * noise
    error = reconstruct(vae, raw).float() - pixels
    loss = (weight * (error.abs() + settings.square_weight * error.square())).mean() / weight.mean()
    for edge, where in zip(_edges(error), (weight[..., 1:, :], weight[..., 1:]), strict=True):
        loss = loss + edge_weight * (where * edge.abs()).mean() / weight.mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return loss + settings.kl_weight * divergence, error.detach().square().mean()


def train_vae(
    clips: Clips, parts: EmbeddedParts, settings: VaeSettings, device: torch.device, compiled: bool,
    seconds: float | None = None, first: Any = None, save: Callable[[Any], None] | None = None,
) -> Any:
    """The autoencoder with averaged weights, in eval mode, on `device`.

    Args:
        seconds: how long; None: the settings' steps.
        first: the autoencoder to go on from.
        save: called with the averaged one every minute.
    """
    vae = (new_vae(parts) if first is None else first).to(device)
    vae.requires_grad_(True).train()
    optimizer = torch.optim.AdamW([{"params": list(vae.parameters()), "base_lr": settings.lr}], lr=settings.lr,
                                  betas=(0.9, 0.99), weight_decay=1e-4, fused=device.type == "cuda")
    average = EmaWeights(vae, settings.ema)
    checkpoints = Checkpoints(None if save is None else partial(save, vae))
    generator = torch.Generator(device).manual_seed(SEED)
    loss_of: Callable[..., tuple[Tensor, Tensor]] = _loss
    if compiled and settings.compiled:
        loss_of = torch.compile(_loss, dynamic=False)
    schedule, count = Schedule(settings.steps, settings.warmup, seconds), 0
    make = partial(_batch, clips, settings, seconds is not None)
    summed = squared = torch.zeros((), device=device)
    for step, (frames, boxes, corners) in prefetch(make, schedule):
        set_lr(optimizer, schedule.lr(step))
        frames, boxes, corners = (x.to(device, non_blocking=True) for x in (frames, boxes, corners))
        pixels = to_pixels(frames)
        weight = _weights(boxes, corners, clips.size, frames.shape[2], settings.head_weight)
        side = frames.shape[2] // vae.config.scale_factor_spatial
        shape = (len(frames), vae.config.z_dim, 1 + (FRAMES - 1) // 4, side, side)
        noise = torch.randn(shape, device=device, generator=generator)
        # Edges count once there is a picture: before, a flat one has the fewest wrong edges.
        edges = 1.0 if first is not None else min(1.0, schedule.progress(step) * settings.steps / settings.edge_warmup)
        edge_weight = torch.tensor(settings.edge_weight * edges, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16 and device.type == "cuda"):
            loss, error = loss_of(vae, pixels, weight, settings, noise, edge_weight)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
        checkpoints.after_step(average)
        summed, squared, count = summed + loss.detach(), squared + error, count + 1
        if (step + 1) % min(_LOG_EVERY, max(settings.steps // 4, 1)) == 0 or schedule.progress(step + 1) >= 1:
            psnr = _decibel(float(squared / count))
            console.log(f"vae step {step + 1} loss {float(summed / count):.4f} psnr {psnr:.2f} dB, clips "
                        f"{clips.ready()}, {schedule.elapsed():.0f} s")
            summed, squared, count = torch.zeros_like(summed), torch.zeros_like(squared), 0
    average.copy_to_parameters()
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def measure_latents(
    vae: Any, clips: Clips, number: int, device: torch.device, sampled: bool
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over the first `number` clips.

    `sampled`: of latents with the encoder's own noise, so that a channel that says little stays small when normalised.
    """
    parts, noise = [], []
    for start in range(0, number, 32):
        frames = torch.from_numpy(np.asarray(clips.frames[start:min(start + 32, number)])).to(device)
        mean, log_variance = moments(vae, to_pixels(frames))
        parts.append(mean.transpose(0, 1).flatten(1).double())
        noise.append(log_variance.exp().transpose(0, 1).flatten(1).double())
    values = torch.cat(parts, dim=1)
    variance = values.var(dim=1) + (torch.cat(noise, dim=1).mean(dim=1) if sampled else 0.0)
    return values.mean(dim=1).tolist(), variance.sqrt().tolist()


def _decibel(mean_square: float) -> float:
    """PSNR of an error over pixels that span 2."""
    return float(10 * np.log10(4 / mean_square))


@torch.no_grad()
def quality(vae: Any, clips: Clips, number: int, device: torch.device) -> tuple[dict[str, float], np.ndarray]:
    """PSNR in dB over whole frames and inside the head's box, and the reconstructions uint8 [N, T, H, W, 3]."""
    whole, inside, area, made = 0.0, 0.0, 0.0, []
    for start in range(0, number, 16):
        stop = min(start + 16, number)
        pixels = to_pixels(torch.from_numpy(np.asarray(clips.frames[start:stop])).to(device))
        boxes = torch.from_numpy(np.asarray(clips.boxes[start:stop])).to(device)
        reconstruction = reconstruct(vae, moments(vae, pixels)[0]).clamp(-1, 1)
        square = (reconstruction - pixels).square().mean(dim=1)
        head = box_mask(boxes, clips.size, clips.size, 0.0)
        whole += float(square.flatten(1).mean(dim=1).sum())
        inside, area = inside + float((square * head).sum()), area + float(head.sum())
        frames = ((reconstruction + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
        made.append(frames.cpu().numpy())
    figures = {"psnr": _decibel(whole / number), "psnr_head": _decibel(inside / area)}
    return figures, np.concatenate(made)
