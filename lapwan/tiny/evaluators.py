"""What evaluates the embedded model: two judges of its scenes, and captions for the linear probe of text features.

`EmbeddedJudge` is the second one, a `lapwan.evaluation.video_judge`: it can say that there is no instrument or that
nothing can be told, and sees two at once. `SceneJudge` is the first, which must name one of the four instruments; it
stays for figures made with it, and the reward reads its network. That network reads
single frames: its deep features classify the instrument, its finer ones locate the tip. Both judges were trained on
rendered scenes only, any instrument with any motion and any target, so neither motion nor target predicts the
instrument. `weights/README.md` has their figures on new scenes and on the VAE's reconstructions, which are an upper
bound for generated videos.
Shapes: T frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lapwan.evaluation.clips import EvaluationClip, VideoShape
from lapwan.evaluation.judge_file import JudgeFile, read_judge
from lapwan.evaluation.metrics import Seen, missing_tips
from lapwan.evaluation.router_accuracy import ProbeCaption, ProbeSet
from lapwan.evaluation.video_judge import VideoJudge
from lapwan.tiny import motion as paths
from lapwan.tiny.captions import caption_for
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.scene_targets import TARGET_NAMES
from lapwan.tiny.scenes import SceneSpec

INPUT = 96  # pixels; other squares are scaled
GRID = 24  # cells of the heat map of the tip
EVALUATOR_FILE, JUDGE_FILE = "evaluator.safetensors", "judge.safetensors"
# Captions with one of these names are held out from fitting the linear probe.
HELD_OUT_NAMES = ("组织剪刀", "单极电凝钩", "吸引管", "无损伤抓钳", "a hook", "suction tip", "aparoscopic")


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())


class InstrumentNet(nn.Module):
    """Frames [B, 3, 96, 96] in [-1, 1] -> logits of the instruments [B, 4] and of the tip's cell [B, 24·24]."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(_layer(3, 24, 2), _layer(24, 48, 2), _layer(48, 48))
        self.middle = nn.Sequential(_layer(48, 80, 2), _layer(80, 80))
        self.deep = nn.Sequential(_layer(80, 96, 2), _layer(96, 96), _layer(96, 96))
        self.name = nn.Linear(192, len(INSTRUMENTS))
        self.back = nn.Sequential(_layer(96 + 80, 64), _layer(64, 64))
        self.place = nn.Sequential(_layer(64 + 48, 48), nn.Conv2d(48, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(x)
        middle = self.middle(fine)
        deep = self.deep(middle)
        names = self.name(torch.cat([deep.mean(dim=(2, 3)), deep.amax(dim=(2, 3))], dim=1))
        back = self.back(torch.cat([F.interpolate(deep, scale_factor=2.0), middle], dim=1))
        heat_map = self.place(torch.cat([F.interpolate(back, scale_factor=2.0), fine], dim=1))
        return names, heat_map.flatten(1)


def tip_position(logits_BN: Tensor) -> Tensor:
    """The tip [B, 2], x and y in 0..1: the mean of the heat map within two cells around its peak."""
    batch = len(logits_BN)
    share = logits_BN.softmax(dim=1).view(batch, GRID, GRID)
    peak = share.flatten(1).argmax(dim=1)
    cells = torch.arange(GRID, device=logits_BN.device)
    near_y = ((cells - (peak // GRID)[:, None]).abs() <= 2).float()
    near_x = ((cells - (peak % GRID)[:, None]).abs() <= 2).float()
    share = share * near_y[:, :, None] * near_x[:, None, :]
    share = share / share.sum(dim=(1, 2), keepdim=True)
    middle = (cells + 0.5) / GRID
    return torch.stack([(share.sum(dim=1) * middle).sum(dim=1), (share.sum(dim=2) * middle).sum(dim=1)], dim=1)


def network_input(frames_THWC: np.ndarray) -> Tensor:
    """uint8 frames -> [T, 3, 96, 96] in [-1, 1].

    Raises:
        ValueError: frames that are not square; distorted instruments would be confused.
    """
    height, width = frames_THWC.shape[1:3]
    if height != width:
        raise ValueError(f"frames of {height}x{width}; the evaluators take square ones")
    pixels = torch.from_numpy(np.ascontiguousarray(frames_THWC)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if pixels.shape[-2:] == (INPUT, INPUT):
        return pixels
    return F.interpolate(pixels, (INPUT, INPUT), mode="bilinear", align_corners=False, antialias=True)


@cache
def load_evaluator() -> InstrumentNet:
    """The shipped network, in eval mode on the CPU."""
    net = InstrumentNet()
    path = files("lapwan.tiny") / "weights" / EVALUATOR_FILE
    net.load_state_dict({name: value.float() for name, value in load_file(str(path)).items()})
    return net.requires_grad_(False).eval()


@torch.no_grad()
def evaluate_identity(frames_THWC: np.ndarray, net: InstrumentNet | None = None) -> np.ndarray:
    """Probability of each of INSTRUMENTS [4], from the mean over frames of the log probabilities."""
    names, _ = (net or load_evaluator())(network_input(frames_THWC))
    shares: np.ndarray = names.log_softmax(dim=1).mean(dim=0).softmax(dim=0).numpy()
    return shares


@torch.no_grad()
def locate_tip(frames_THWC: np.ndarray, net: InstrumentNet | None = None) -> np.ndarray:
    """The tip in every frame: [T, 2], x and y in 0..1."""
    _, heat_map = (net or load_evaluator())(network_input(frames_THWC))
    tips_T2: np.ndarray = tip_position(heat_map).numpy()
    return tips_T2


def tip_hits(tips_T2: np.ndarray, truth_T2: np.ndarray, size: tuple[int, int], within: float = 0.05) -> np.ndarray:
    """Bool per frame: the tip's error is at most `within` of the picture's diagonal; frames whose true tip is out of
    view are left out."""
    height, width = size
    scale = np.array([width, height])
    in_view = ((truth_T2 >= 0) & (truth_T2 <= 1)).all(axis=1)
    distance = np.hypot(*((tips_T2 - truth_T2) * scale).T)
    hits: np.ndarray = (distance <= within * np.hypot(height, width))[in_view]
    return hits


def _not_a_scene(clip: EvaluationClip) -> str | None:
    if clip.synthetic and clip.instrument in INSTRUMENTS:
        return None
    return (f"clip '{clip.id}' is not one of the embedded model's synthetic scenes (source = \"synthetic\", "
            f"instrument one of {', '.join(INSTRUMENTS)}), which its evaluators are for; for other clips give a judge "
            "made by lapwan train-judge, with --judge FILE")


def _not_square(shape: VideoShape) -> str | None:
    height, width = shape.size
    return None if height == width else f"the evaluators take square frames, not {height}x{width}"


@cache
def load_judge() -> JudgeFile:
    """The shipped second judge, on the CPU."""
    return read_judge(Path(str(files("lapwan.tiny") / "weights" / JUDGE_FILE)))


class EmbeddedJudge(VideoJudge):
    """The second judge, of rendered scenes: the truth is a line's `instrument`, and its `second` one if it has one."""

    def __init__(self) -> None:
        super().__init__(load_judge())

    def named(self, clip: EvaluationClip) -> list[int]:
        """INSTRUMENTS' numbers of the clip's one or two."""
        return [INSTRUMENTS.index(name) for name in (clip.instrument, clip.second) if name is not None]

    def refuses(self, clip: EvaluationClip) -> str | None:
        """Refuses a clip that is not a rendered scene."""
        return _not_a_scene(clip)

    def refuses_shape(self, shape: VideoShape) -> str | None:
        """Refuses frames that are not square."""
        return _not_square(shape)


class SceneJudge:
    """The first judge, an `evaluation.metrics.Judge` of the embedded model's scenes.

    `identity`: 1 if the video shows the clip's instrument. `tip_accuracy`: share of frames with the tip within 5 % of
    the diagonal from the true one; frames whose true tip is out of view do not count. The network is loaded with the
    first video.
    """

    classes: tuple[str, ...] = INSTRUMENTS
    figures: Mapping[str, tuple[str, ...]] = MappingProxyType({"identity": ("identity",), "tip": ("tip_accuracy",)})
    fingerprint = ""

    def refuses(self, clip: EvaluationClip) -> str | None:
        """Refuses a clip that is not a rendered scene."""
        return _not_a_scene(clip)

    def refuses_shape(self, shape: VideoShape) -> str | None:
        """Refuses frames that are not square."""
        return _not_square(shape)

    def refuses_tip(self, clip: EvaluationClip, shape: VideoShape) -> str | None:
        """Refuses a clip without a tip in every frame."""
        return missing_tips(clip, shape)

    def score(self, metric: str, frames_THWC: np.ndarray, clip: EvaluationClip) -> Mapping[str, float]:
        """One metric of one video; NaN tip accuracy if the clip has fewer tips than frames."""
        if metric == "identity":
            predicted = self.classes[int(evaluate_identity(frames_THWC).argmax())]
            return {"identity": float(predicted == clip.instrument)}
        if metric != "tip":
            raise ValueError(f"no metric '{metric}'; there are {', '.join(self.figures)}")
        tips_T2, frames = clip.tips_T2, len(frames_THWC)
        if tips_T2 is None or len(tips_T2) < frames:
            return {"tip_accuracy": float("nan")}
        height, width = frames_THWC.shape[1:3]
        hits = tip_hits(locate_tip(frames_THWC), tips_T2[:frames], (height, width))
        return {"tip_accuracy": float(hits.mean()) if len(hits) else float("nan")}

    def describe(self, frames_THWC: np.ndarray, clip: EvaluationClip) -> Seen:
        """The instrument of the highest probability, and the tip in every frame."""
        with torch.no_grad():
            names, heat_map = load_evaluator()(network_input(frames_THWC))
        shares = names.log_softmax(dim=1).mean(dim=0).softmax(dim=0)
        best = int(shares.argmax())
        return Seen(self.classes[best], float(shares[best]), tip_position(heat_map).numpy())


def probe_captions(count: int = 1200, seed: int = 0) -> ProbeSet:
    """Captions of scenes for the linear probe of text features, instruments in turn; the set is named "synthetic".

    The probe is fitted on captions with some of the instruments' names and tested on captions with the others, all of
    which occurred in pretraining. Any instrument has any motion and target, so only its name and verb are informative.
    """
    rng = np.random.default_rng(seed)
    captions = []
    for index in range(count):
        instrument = INSTRUMENTS[index % len(INSTRUMENTS)]
        motion = str(rng.choice(list(paths.MOTIONS)))
        spec = SceneSpec(
            instrument, side=str(rng.choice(list(paths.SIDES))), motion=motion,
            direction=str(rng.choice(paths.MOTIONS[motion])), target=str(rng.choice(TARGET_NAMES)),
        )
        text = caption_for(spec, rng)
        captions.append(ProbeCaption(text, instrument, any(name in text for name in HELD_OUT_NAMES)))
    return ProbeSet("synthetic", tuple(captions))
