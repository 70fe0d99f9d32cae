"""The network of a judge: what instruments a frame shows, whether it shows any, and where their tips are.

A frame is put whole onto a canvas of the judge's size, its aspect ratio kept, grey beside it. The deep features give
the state of the picture (an instrument, none, unclear) and, independently of each other, the families that are seen, so
that two at once are two answers; a heat map of each family, four pixels a cell, gives its tip.

Shapes: B frames, H, W pixels of the canvas, K families, G cells of a heat map (H/4 · W/4), T frames of one video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STATES = ("instrument", "none", "unclear")
INSTRUMENT, NONE, UNCLEAR = range(3)
CELL = 4  # pixels of the canvas
STRIDE = 16  # of the deepest features: the canvas is a multiple of it
_NEAR = 2  # cells around a heat map's peak
_BATCH = 64  # frames


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())


@dataclass(frozen=True)
class JudgeLogits:
    """Of frames: `state_B3` in the order of STATES, `families_BK`, and the heat maps `tips_BKG`."""

    state_B3: Tensor
    families_BK: Tensor
    tips_BKG: Tensor


class JudgeNet(nn.Module):
    """Frames [B, 3, H, W] in [-1, 1] on the canvas -> `JudgeLogits`.

    Args:
        families: K.
    """

    def __init__(self, families: int) -> None:
        super().__init__()
        self.families = families
        self.fine = nn.Sequential(_layer(3, 24, 2), _layer(24, 48, 2), _layer(48, 48))
        self.middle = nn.Sequential(_layer(48, 80, 2), _layer(80, 80))
        self.deep = nn.Sequential(_layer(80, 112, 2), _layer(112, 112), _layer(112, 112))
        self.answer = nn.Sequential(nn.Linear(2 * (80 + 112), 96), nn.SiLU(), nn.Linear(96, len(STATES) + families))
        self.back = nn.Sequential(_layer(112 + 80, 64), _layer(64, 64))
        self.tips = nn.Sequential(_layer(64 + 48, 48), nn.Conv2d(48, families, 1))

    def forward(self, x: Tensor) -> JudgeLogits:
        fine = self.fine(x)
        middle = self.middle(fine)
        deep = self.deep(middle)
        pooled = [pool for y in (middle, deep) for pool in (y.mean(dim=(2, 3)), y.amax(dim=(2, 3)))]
        answer = self.answer(torch.cat(pooled, dim=1))
        back = self.back(torch.cat([F.interpolate(deep, scale_factor=2.0), middle], dim=1))
        heat_maps = self.tips(torch.cat([F.interpolate(back, scale_factor=2.0), fine], dim=1))
        return JudgeLogits(answer[:, :len(STATES)], answer[:, len(STATES):], heat_maps.flatten(2))


@dataclass(frozen=True)
class Canvas:
    """The picture that the network reads: `height`, `width` in pixels, multiples of 16."""

    height: int
    width: int

    def placed(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a picture of this size on the canvas: as large as fits, in the middle."""
        scale = min(self.height / height, self.width / width)
        h, w = min(self.height, round(height * scale)), min(self.width, round(width * scale))
        return (self.height - h) // 2, (self.width - w) // 2, h, w

    def put(self, frames_THWC: np.ndarray) -> np.ndarray:
        """uint8 frames of any size -> uint8 [T, height, width, 3]."""
        top, left, h, w = self.placed(*frames_THWC.shape[1:3])
        if frames_THWC.shape[1:3] == (h, w) == (self.height, self.width):
            return np.ascontiguousarray(frames_THWC)
        pixels = torch.from_numpy(np.ascontiguousarray(frames_THWC)).permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, (h, w), mode="bilinear", align_corners=False, antialias=True)
        canvas = np.full((len(frames_THWC), self.height, self.width, 3), 127, np.uint8)
        canvas[:, top:top + h, left:left + w] = pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        return canvas

    def to_canvas(self, points_T2: np.ndarray, height: int, width: int) -> np.ndarray:
        """Points x, y in 0..1 of a picture of this size -> in 0..1 of the canvas."""
        top, left, h, w = self.placed(height, width)
        placed: np.ndarray = (points_T2 * [w, h] + [left, top]) / [self.width, self.height]
        return placed

    def from_canvas(self, points_T2: np.ndarray, height: int, width: int) -> np.ndarray:
        """The inverse of `to_canvas`."""
        top, left, h, w = self.placed(height, width)
        points: np.ndarray = (points_T2 * [self.width, self.height] - [left, top]) / [w, h]
        return points

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of a heat map."""
        return self.height // CELL, self.width // CELL


def pixels_of(frames_BHWC: Tensor) -> Tensor:
    """uint8 frames on the canvas -> [B, 3, H, W] in [-1, 1]."""
    return frames_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


def tip_of(logits_BG: Tensor, cells: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The tip [B, 2], x and y in 0..1 of the canvas, and the share [B] of the heat map within two cells of its peak.

    The tip is the mean of the heat map there.
    """
    rows, columns = cells
    share = logits_BG.softmax(dim=1).view(-1, rows, columns)
    peak = share.flatten(1).argmax(dim=1)
    ys, xs = (torch.arange(n, device=logits_BG.device) for n in cells)
    near_y = ((ys - (peak // columns)[:, None]).abs() <= _NEAR).float()
    near_x = ((xs - (peak % columns)[:, None]).abs() <= _NEAR).float()
    share = share * near_y[:, :, None] * near_x[:, None, :]
    mass = share.sum(dim=(1, 2))
    x = (share.sum(dim=1) * ((xs + 0.5) / columns)).sum(dim=1) / mass
    y = (share.sum(dim=2) * ((ys + 0.5) / rows)).sum(dim=1) / mass
    return torch.stack([x, y], dim=1), mass


@dataclass(frozen=True)
class Temperatures:
    """What the logits of a video are divided by before they are read as probabilities."""

    state: float = 1.0
    families: float = 1.0


@dataclass(frozen=True)
class JudgeReading:
    """What a judge sees in one video.

    Attributes:
        state_3: probabilities of STATES.
        families_K: probability that each family is seen, given that an instrument is.
        tips_TK2: the tip of each family in each frame, x and y in 0..1 of the frame.
        confidence_TK: of each tip, 0..1: P(an instrument) · P(the family) · the share of its heat map near the tip.
    """

    state_3: np.ndarray
    families_K: np.ndarray
    tips_TK2: np.ndarray
    confidence_TK: np.ndarray

    @property
    def state(self) -> int:
        """The most likely of STATES."""
        return int(self.state_3.argmax())

    @property
    def top(self) -> int:
        """The most likely family, whatever the state."""
        return int(self.families_K.argmax())

    @property
    def seen(self) -> tuple[int, ...]:
        """The families seen: those with a probability of at least 1/2, else the most likely; none in other states."""
        if self.state != INSTRUMENT:
            return ()
        likely = tuple(int(k) for k in np.flatnonzero(self.families_K >= 0.5))
        return likely or (self.top,)

    @property
    def confidence(self) -> float:
        """Probability of the verdict: of `none` or `unclear`, or of an instrument times that of the most likely."""
        p = float(self.state_3[self.state])
        return p * float(self.families_K[self.top]) if self.state == INSTRUMENT else p

    def shows(self, families: Sequence[int]) -> bool:
        """Whether the video shows these families: an instrument is seen, the most likely ones are these, and of
        several each has a probability of at least 1/2."""
        if self.state != INSTRUMENT:
            return False
        likely = np.argsort(-self.families_K, kind="stable")[:len(families)]
        several = len(families) > 1
        return set(likely.tolist()) == set(families) and not (several and self.families_K[likely].min() < 0.5)


@dataclass(frozen=True)
class VideoLogits:
    """Means over the frames of one video, [3] and [K], with its tips on the canvas."""

    state_3: np.ndarray
    families_K: np.ndarray
    tips_TK2: np.ndarray
    mass_TK: np.ndarray

    def reading(self, temperatures: Temperatures) -> JudgeReading:
        """Logits divided by the temperatures, as probabilities; tips stay on the canvas."""
        state = np.exp(_log_softmax(self.state_3 / temperatures.state))
        families = 1 / (1 + np.exp(-self.families_K / temperatures.families))
        confidence = self.mass_TK * families * state[INSTRUMENT]
        return JudgeReading(state, families, self.tips_TK2, confidence)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    log_softmax: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return log_softmax


@torch.no_grad()
def read_video(net: JudgeNet, frames_THWC: np.ndarray, canvas: Canvas) -> VideoLogits:
    """The network on every frame of one video that lies on the canvas, uint8."""
    device = next(net.parameters()).device
    states, families, tips, masses = [], [], [], []
    for part in torch.split(torch.from_numpy(frames_THWC), _BATCH):
        logits = net(pixels_of(part.to(device)))
        states.append(logits.state_B3)
        families.append(logits.families_BK)
        count = logits.tips_BKG.shape[1]
        tip, mass = tip_of(logits.tips_BKG.flatten(0, 1), canvas.cells)
        tips.append(tip.view(-1, count, 2))
        masses.append(mass.view(-1, count))
    mean = [torch.cat(values).mean(dim=0).double().cpu().numpy() for values in (states, families)]
    return VideoLogits(mean[0], mean[1], torch.cat(tips).cpu().numpy(), torch.cat(masses).cpu().numpy())
