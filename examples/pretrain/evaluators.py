"""Train the network of `lapwan.tiny.evaluators` on rendered surgical scenes of their own seeds, and measure it."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.pretrain.corpus import FRAMES, Clips
from examples.pretrain.settings import SEED, EvaluatorSettings
from examples.pretrain.training import cosine, set_lr
from lapwan import console
from lapwan.tiny.evaluators import GRID, INPUT, InstrumentNet, evaluate_identity, locate_tip, tip_hits

_LOG_EVERY = 500


def _augmented(frames: Tensor, tips: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flips (with the tip), colours, blur by shrinking and growing, noise: what a generator may do to a picture."""
    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, device=frames.device, generator=generator)

    batch = len(frames)
    for axis, coordinate in ((3, 0), (2, 1)):
        flip = draw(batch) < 0.5
        frames = torch.where(flip[:, None, None, None], frames.flip(axis), frames)
        turned = tips.clone()
        turned[:, coordinate] = 1 - tips[:, coordinate]
        tips = torch.where(flip[:, None], turned, tips)
    frames = (frames + 1) * (0.8 + 0.4 * draw(batch, 3, 1, 1)) - 1 + 0.2 * (draw(batch, 1, 1, 1) - 0.5)
    small = int(INPUT / (1 + 1.6 * float(draw(1))))
    soft = F.interpolate(frames, (small, small), mode="bilinear", antialias=True)
    soft = F.interpolate(soft, (INPUT, INPUT), mode="bilinear")
    frames = torch.lerp(frames, soft, draw(batch, 1, 1, 1))
    noise = torch.randn(frames.shape, device=frames.device, generator=generator)
    return frames + 0.1 * draw(batch, 1, 1, 1) * noise, tips


def _cells(tips: Tensor) -> Tensor:
    """Target map [B, GRID²]: the tip's weight split among its four nearest cells."""
    at = tips * GRID - 0.5
    cells = torch.arange(GRID, device=tips.device)
    along_x = (1 - (cells - at[:, :1]).abs()).clamp_min(0)
    along_y = (1 - (cells - at[:, 1:]).abs()).clamp_min(0)
    both = (along_y[:, :, None] * along_x[:, None, :]).flatten(1)
    return both / both.sum(dim=1, keepdim=True).clamp_min(1e-6)


def train_evaluator(clips: Clips, settings: EvaluatorSettings, device: torch.device) -> InstrumentNet:
    """The trained network, in eval mode, on the CPU."""
    clips.wait(clips.count)
    torch.manual_seed(SEED + 2)
    net = InstrumentNet().to(device)
    names = torch.from_numpy(clips.instruments()).to(device)
    optimizer = torch.optim.AdamW([{"params": list(net.parameters()), "base_lr": settings.lr}], lr=settings.lr,
                                  weight_decay=0.02)
    generator = torch.Generator(device).manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    started = time.monotonic()
    for step in range(settings.steps):
        set_lr(optimizer, cosine(step, settings.steps, min(200, settings.steps // 4)))
        which, when = rng.integers(clips.count, size=settings.batch), rng.integers(FRAMES, size=settings.batch)
        frames = torch.from_numpy(np.stack([clips.frames[i, t] for i, t in zip(which, when, strict=True)])).to(device)
        tips = torch.from_numpy(np.stack([clips.tips[i, t] for i, t in zip(which, when, strict=True)])).to(device)
        pixels, tips = _augmented(frames.permute(0, 3, 1, 2).float() / 127.5 - 1, tips, generator)
        seen = ((tips >= 0) & (tips <= 1)).all(dim=1).float()
        logits, tip_map = net(pixels)
        named = F.cross_entropy(logits, names[torch.from_numpy(which).to(device)], label_smoothing=0.02)
        placed = -(_cells(tips) * tip_map.log_softmax(dim=1)).sum(dim=1)
        loss = named + (placed * seen).sum() / seen.sum().clamp_min(1)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % min(_LOG_EVERY, max(settings.steps // 4, 1)) == 0 or step + 1 == settings.steps:
            console.log(f"evaluator step {step + 1} loss {loss.item():.4f} of names {named.item():.4f}, "
                        f"{time.monotonic() - started:.0f} s")
    return net.requires_grad_(False).eval().cpu()


def measure_evaluator(net: InstrumentNet, clips: Clips, frames_NTHWC: np.ndarray) -> dict[str, float]:
    """Over clips shown as `frames_NTHWC` (themselves or reconstructions): share named rightly by clip and by frame,
    share of tips within 5 % of the diagonal, median error in pixels."""
    instruments = clips.instruments()[:len(frames_NTHWC)]
    right, by_frame, hits, errors = [], [], [], []
    for index, frames in enumerate(frames_NTHWC):
        right.append(int(evaluate_identity(frames, net).argmax()) == instruments[index])
        by_frame += [int(evaluate_identity(frame[None], net).argmax()) == instruments[index] for frame in frames[::4]]
        tips, truth = locate_tip(frames, net), clips.tips[index]
        hits += tip_hits(tips, truth, (clips.size, clips.size)).tolist()
        errors += np.hypot(*((tips - truth) * clips.size).T).tolist()
    return {"identity": float(np.mean(right)), "identity_by_frame": float(np.mean(by_frame)),
            "tip_accuracy": float(np.mean(hits)), "tip_median_px": float(np.median(errors))}
