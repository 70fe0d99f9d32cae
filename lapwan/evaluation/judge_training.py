"""Training of a judge: clips with their states, families and tips, and what makes a clear picture unclear.

    L = CE(state) + BCE(families, of frames with an instrument) + CE(tip's cell, of the families whose tip is known)

Unclear pictures are partly stored clips and partly made of the batch: blends of two, shuffled tiles, heavy blur, heavy
noise, washed-out contrast. Slighter changes of the same kinds leave a picture's answer as it is.

Shapes: N clips, T frames, H, W pixels of the canvas, K families, B frames of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lapwan.errors import UserError
from lapwan.evaluation.judge_net import INSTRUMENT, NONE, UNCLEAR, Canvas, JudgeNet, pixels_of
from lapwan.models.device import free_bytes

DESTRUCTIONS = ("blend", "tiles", "blur", "noise", "faded")
_WARMUP = 0.08  # of the steps
_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class JudgeClips:
    """Clips on the canvas, with what is known of each.

    Attributes:
        frames_NTHWC: uint8.
        state_NT: index into STATES; -1 where it is not known: the frame is not used.
        families_NK: 1 for the families that the clip shows.
        tips_NTK2: x, y in 0..1 of the canvas; NaN where a family is not there, out of view, or its tip unknown.
    """

    frames_NTHWC: np.ndarray
    state_NT: np.ndarray
    families_NK: np.ndarray
    tips_NTK2: np.ndarray

    def __len__(self) -> int:
        return len(self.frames_NTHWC)

    @property
    def canvas(self) -> Canvas:
        """The canvas of its frames."""
        return Canvas(*self.frames_NTHWC.shape[2:4])

    def part(self, rows: np.ndarray | Sequence[int]) -> JudgeClips:
        """Some of the clips, in this order."""
        at = np.asarray(rows, dtype=np.int64)
        return JudgeClips(self.frames_NTHWC[at], self.state_NT[at], self.families_NK[at], self.tips_NTK2[at])

    def states(self) -> np.ndarray:
        """[N] each clip's state: that of most of its known frames."""
        counts = np.stack([(self.state_NT == state).sum(axis=1) for state in (INSTRUMENT, NONE, UNCLEAR)], axis=1)
        most: np.ndarray = counts.argmax(axis=1)
        return most


def joined(parts: Sequence[JudgeClips]) -> JudgeClips:
    """All clips of several sets, which have the same canvas, length and families."""
    return JudgeClips(*(np.concatenate([getattr(part, name) for part in parts])
                        for name in ("frames_NTHWC", "state_NT", "families_NK", "tips_NTK2")))


def unclear_clips(frames_NTHWC: np.ndarray, families: int) -> JudgeClips:
    """Clips whose pictures are unclear throughout."""
    count, frames = frames_NTHWC.shape[:2]
    return JudgeClips(frames_NTHWC, np.full((count, frames), UNCLEAR), np.zeros((count, families), np.float32),
                      np.full((count, frames, families, 2), np.nan, np.float32))


@dataclass(frozen=True)
class JudgeTraining:
    """Numbers of a training; `made_unclear`: the part of each batch that is destroyed on the spot."""

    steps: int = 1500
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.02
    made_unclear: float = 0.15
    seed: int = 0


def _tiles(x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """The picture cut into 4x4 to 8x8 tiles and put together in another order."""
    batch, channels, height, width = x_BCHW.shape
    n = (4, 8)[int(torch.randint(2, (), generator=generator, device=x_BCHW.device))]
    h, w = height // n, width // n
    tiles = x_BCHW[:, :, :h * n, :w * n].view(batch, channels, n, h, n, w).permute(0, 2, 4, 1, 3, 5)
    order = torch.rand((batch, n * n), generator=generator, device=x_BCHW.device).argsort(dim=1)
    shuffled = tiles.reshape(batch, n * n, channels, h, w).gather(
        1, order[:, :, None, None, None].expand(-1, -1, channels, h, w))
    out = x_BCHW.clone()
    out[:, :, :h * n, :w * n] = shuffled.view(batch, n, n, channels, h, w).permute(0, 3, 1, 4, 2, 5).reshape(
        batch, channels, h * n, w * n)
    return out


def _blurred(x_BCHW: Tensor, factor: float) -> Tensor:
    size = (x_BCHW.shape[-2], x_BCHW.shape[-1])
    small = F.interpolate(x_BCHW, (max(2, round(size[0] / factor)), max(2, round(size[1] / factor))), mode="bilinear",
                          antialias=True)
    return F.interpolate(small, size, mode="bilinear")


def destroy(x_BCHW: Tensor, others_BCHW: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Pictures in which nothing can be told any more.

    Args:
        x_BCHW: pictures in [-1, 1].
        others_BCHW: as many other ones, for blends.
        kind: of DESTRUCTIONS.
        generator: on the pictures' device.
    """
    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, device=x_BCHW.device, generator=generator)

    batch = len(x_BCHW)
    noise = torch.randn(x_BCHW.shape, device=x_BCHW.device, generator=generator)
    if kind == "blend":
        return torch.lerp(x_BCHW, others_BCHW, 0.4 + 0.2 * draw(batch, 1, 1, 1))
    if kind == "tiles":
        return _tiles(x_BCHW, generator)
    if kind == "blur":
        return _blurred(x_BCHW, 12 + 12 * float(draw(1))) + 0.05 * draw(batch, 1, 1, 1) * noise
    if kind == "noise":
        strength = 0.70 + 0.25 * draw(batch, 1, 1, 1)
        return (1 - strength) * x_BCHW + strength * noise
    return x_BCHW * (0.04 + 0.04 * draw(batch, 1, 1, 1)) + (2 * draw(batch, 3, 1, 1) - 1) * 0.7 + 0.05 * noise


def _augmented(x: Tensor, tips: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flips and zoom (with the tips), colours, blur, noise: what a generator may do to a picture that stays clear."""
    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, device=x.device, generator=generator)

    batch = len(x)
    for axis, coordinate in ((3, 0), (2, 1)):
        flip = draw(batch) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(axis), x)
        turned = tips.clone()
        turned[..., coordinate] = 1 - tips[..., coordinate]
        tips = torch.where(flip[:, None, None], turned, tips)
    x, tips = _zoomed(x, tips, draw(batch), draw(batch, 2))
    x = (x + 1) * (0.8 + 0.4 * draw(batch, 3, 1, 1)) - 1 + 0.2 * (draw(batch, 1, 1, 1) - 0.5)
    x = torch.lerp(x, _blurred(x, 1 + 1.6 * float(draw(1))), draw(batch, 1, 1, 1))
    noise = torch.randn(x.shape, device=x.device, generator=generator)
    return x + 0.12 * draw(batch, 1, 1, 1) * noise, tips


def _zoomed(x: Tensor, tips: Tensor, amount_B: Tensor, at_B2: Tensor) -> tuple[Tensor, Tensor]:
    """A window of 0.75 to 1 of the side of half of the pictures, enlarged; it keeps the tips that are known."""
    side = torch.where(amount_B < 0.5, torch.ones_like(amount_B), 1 - 0.5 * (amount_B - 0.5))
    known = torch.isfinite(tips)
    low = torch.where(known, tips, torch.full_like(tips, 1.0)).amin(dim=1)
    high = torch.where(known, tips, torch.full_like(tips, 0.0)).amax(dim=1)
    # The window's first corner, drawn so that every tip stays inside by 5 % of the picture.
    room = 1 - side[:, None]
    first = torch.minimum(torch.maximum(at_B2 * room, high + 0.05 - side[:, None]), low - 0.05)
    first = torch.minimum(first.clamp_min(0), room)
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = 2 * first + side[:, None] - 1
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return x, (tips - first[:, None]) / side[:, None, None]


def _cell_targets(tips_M2: Tensor, cells: tuple[int, int]) -> Tensor:
    """[M, G]: the tip's weight split among its four nearest cells."""
    rows, columns = cells
    x, y = tips_M2[:, :1] * columns - 0.5, tips_M2[:, 1:] * rows - 0.5
    along_x = (1 - (torch.arange(columns, device=tips_M2.device) - x).abs()).clamp_min(0)
    along_y = (1 - (torch.arange(rows, device=tips_M2.device) - y).abs()).clamp_min(0)
    both = (along_y[:, :, None] * along_x[:, None, :]).flatten(1)
    return both / both.sum(dim=1, keepdim=True).clamp_min(1e-6)


class _Sampler:
    """Frames drawn so that every group of clips (each set of families, none, unclear) is as likely as any other."""

    def __init__(self, clips: JudgeClips, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        where_N, when_N = np.nonzero(clips.state_NT >= 0)
        state = clips.state_NT[where_N, when_N]
        keys = [(int(s), *(clips.families_NK[n] > 0.5).tolist()) if s == INSTRUMENT else (int(s),)
                for n, s in zip(where_N, state, strict=True)]
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, key in enumerate(keys):
            groups.setdefault(key, []).append(row)
        self._rows = [np.array(rows) for rows in groups.values()]
        # Pairs of instruments are many groups: together they count as two.
        pairs = [key[0] == INSTRUMENT and sum(key[1:]) > 1 for key in groups]
        weight = np.array([2 / max(sum(pairs), 1) if pair else 1.0 for pair in pairs])
        self._shares = np.minimum(weight, np.array([len(rows) for rows in self._rows]) / 8)
        self._shares /= self._shares.sum()
        self._where, self._when = where_N, when_N

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(clip, frame) of `count` frames."""
        groups = self._rng.choice(len(self._rows), count, p=self._shares)
        rows = np.array([self._rows[g][self._rng.integers(len(self._rows[g]))] for g in groups])
        return self._where[rows], self._when[rows]


def _rate(step: int, steps: int) -> float:
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def judge_loss(net: JudgeNet, x: Tensor, state_B: Tensor, families_BK: Tensor, tips_BK2: Tensor,
               cells: tuple[int, int]) -> Tensor:
    """The loss at the top of this file, a mean over frames."""
    logits = net(x)
    named = F.cross_entropy(logits.state_B3, state_B, label_smoothing=0.01)
    there = state_B == INSTRUMENT
    seen = F.binary_cross_entropy_with_logits(logits.families_BK, 0.98 * families_BK + 0.01, reduction="none").mean(1)
    loss = named + (seen * there).sum() / there.sum().clamp_min(1)
    in_view = ((tips_BK2 >= 0) & (tips_BK2 <= 1)).all(dim=2) & there[:, None]
    if bool(in_view.any()):
        heat_maps = logits.tips_BKG[in_view].log_softmax(dim=1)
        loss = loss - (_cell_targets(tips_BK2[in_view], cells) * heat_maps).sum(dim=1).mean()
    return loss


def train_judge_net(
    clips: JudgeClips, training: JudgeTraining, device: torch.device,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> JudgeNet:
    """The trained network, frozen, in eval mode, on `device`.

    Args:
        clips: with every state; unclear ones are also made of the others.
        training: its numbers.
        device: that trains.
        on_step: called after each step with its number from 1 and, every 50th, its loss (else NaN).

    Raises:
        UserError: the training has diverged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        net = JudgeNet(clips.families_NK.shape[1])
    net.to(device)
    frames, cells = _near(torch.from_numpy(clips.frames_NTHWC), device), clips.canvas.cells
    sampler = _Sampler(clips, training.seed)
    generator = torch.Generator(device).manual_seed(training.seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=training.lr, weight_decay=training.weight_decay)
    made = round(training.made_unclear * training.batch)
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.lr * _rate(step, training.steps)
        where, when = sampler.draw(training.batch)
        rows = (torch.from_numpy(index).to(frames.device) for index in (where, when))
        x = pixels_of(frames[tuple(rows)].to(device))
        state = torch.from_numpy(clips.state_NT[where, when]).to(device)
        tips = torch.from_numpy(clips.tips_NTK2[where, when]).to(device)
        families = torch.from_numpy(clips.families_NK[where]).to(device)
        x, tips = _augmented(x, tips, generator)
        if made:
            kind = DESTRUCTIONS[step % len(DESTRUCTIONS)]
            x = torch.cat([destroy(x[:made], x[made:2 * made], kind, generator), x[made:]])
            # A blend of two empty pictures shows that it is empty.
            empty = (state[:made] == NONE) & (state[made:2 * made] == NONE) if kind == "blend" else None
            state = state.clone()
            state[:made] = UNCLEAR if empty is None else torch.where(empty, NONE, UNCLEAR)
        loss = judge_loss(net, x, state, families, tips, cells)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(net.parameters(), _GRADIENT_NORM)
        optimizer.step()
        on_step(step + 1, float(loss.detach()) if (step + 1) % 50 == 0 else math.nan)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in net.parameters()):
        raise UserError(f"the judge's weights are not finite after {training.steps} steps; lower lr ({training.lr:g})")
    return net.requires_grad_(False).eval()


def _near(frames: Tensor, device: torch.device) -> Tensor:
    """The frames on the device, if they take at most half of what is free there."""
    free = free_bytes(device)
    return frames if free is None or 2 * frames.nbytes > free else frames.to(device)


def destroyed_clips(clips: JudgeClips, seed: int, kinds: Sequence[str] = DESTRUCTIONS) -> JudgeClips:
    """Each clip destroyed throughout, the kinds in turn; a blend is with a clip of other families."""
    generator, out = torch.Generator().manual_seed(seed), np.empty_like(clips.frames_NTHWC)
    order = np.random.default_rng(seed).permutation(len(clips))
    for n in range(len(clips)):
        differs = [m for m in order if not np.array_equal(clips.families_NK[m], clips.families_NK[n])]
        other = differs[n % len(differs)] if differs else int(order[n])
        x, y = (pixels_of(torch.from_numpy(clips.frames_NTHWC[i])) for i in (n, other))
        broken = destroy(x, y, kinds[n % len(kinds)], generator)
        pixels = ((broken.clamp(-1, 1) + 1) * 127.5).round().byte()
        out[n] = pixels.permute(0, 2, 3, 1).numpy()
    return unclear_clips(out, clips.families_NK.shape[1])
