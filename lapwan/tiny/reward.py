"""A reward for frames of the embedded model: instrument, light, colour, contrast and smoothness.

It is differentiable and small enough for a CPU, so preference alignment can be tried without a large reward model. A
caption's instrument comes from the label rule, its control words (`WORDS`, English and Chinese) name appearances; a
frame is scored by the shipped evaluator and by four statistics. Both give unit vectors
[c, a·(instrument − 1/4), b·appearance].
Shapes: B frames, N captions, D = 1 + 4 + 4.

How to add a word: a row in `WORDS`; it must not be a word of the taxonomy, whose families it would otherwise name.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from lapwan.data.caption_text import units
from lapwan.data.labels import label_caption
from lapwan.data.taxonomy import load_taxonomy
from lapwan.rewards.base import EmbeddingCache, RewardKind, RewardKinds
from lapwan.rewards.build import REWARD_KINDS
from lapwan.rewards.preprocess import to_square
from lapwan.settings.rewards import TinyRewardSettings
from lapwan.tiny.evaluators import INPUT, load_evaluator
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.scenes import FAMILIES

_GRAPH_BYTES = 2_900_000  # kept for the backward through a picture
APPEARANCES = ("light", "colour", "contrast", "smooth")
# What a word asks for in light, colour, contrast and smoothness; the words of a text add up, clamped to -1..1.
WORDS: dict[str, tuple[float, float, float, float]] = {
    **dict.fromkeys(("bright", "well lit", "natural lighting", "明亮", "自然光"), (1, 0, 0, 0)),
    **dict.fromkeys(("dark", "dim", "昏暗", "阴暗"), (-1, 0, 0, 0)),
    **dict.fromkeys(("red", "vivid", "colourful", "colorful", "鲜红", "鲜艳"), (0, 1, 0, 0)),
    **dict.fromkeys(("pale", "grey", "gray", "colourless", "colorless", "苍白", "灰白"), (0, -1, 0, 0)),
    **dict.fromkeys(("detail", "detailed", "contrast", "细节", "对比"), (0, 0, 1, 0)),
    **dict.fromkeys(("flat", "faded", "平淡", "模糊"), (0, 0, -1, 0)),
    **dict.fromkeys(("smooth", "crisp", "平滑", "清晰"), (0, 0, 0, 1)),
    **dict.fromkeys(("grainy", "noisy", "blotchy", "噪点", "粗糙"), (0, 0, 0, -1)),
    **dict.fromkeys(("real", "realistic", "photo", "真实", "逼真"), (0, 1, 0, 1)),
    **dict.fromkeys(("painting", "oil", "concept art", "anime", "油画", "绘画", "动漫"), (0, -1, 0, -1)),
}
_PHRASES = tuple((units(word), torch.tensor(wish)) for word, wish in WORDS.items())
# The common part keeps the cosines of a text and its opposite close, as those of a large model are: R stays below the
# hinge's 0.7 in both branches for every frame, so the gradient never vanishes.
_COMMON, _INSTRUMENT, _APPEARANCE = 1.0, 0.8, 0.35
_SOFTENING = 2.0  # temperature of the evaluator's logits: a saturated softmax has no gradient
# Middle and half-width of each statistic over rendered scenes of both styles and stills of the untrained base:
# mean of luma; mean of r − (g + b)/2; log of luma's deviation; log of luma's mean slope a pixel.
_MIDDLE = (0.5, 0.1, -1.6, -2.2)
_HALF_WIDTH = (0.2, 0.08, 0.3, -0.3)  # the steeper, the less smooth
_LUMA = (0.299, 0.587, 0.114)


class TinyReward:
    """Cosine of what a caption asks for and what a frame shows; its score is the cosine itself."""

    scale = 1.0
    english_text = False

    def __init__(self, name: str = "tiny") -> None:
        self.name = name
        self._net = copy.deepcopy(load_evaluator())  # the shared one stays on the CPU
        self._cache = EmbeddingCache()
        self._taxonomy = load_taxonomy("surgical4")
        self._device = torch.device("cpu")

    def to(self, device: torch.device | str) -> Self:
        """Move the network."""
        self._net.to(device)
        self._device = torch.device(device)
        return self

    def text(self, captions: Sequence[str]) -> Tensor:
        """[N, D] fp32, unit norm; a caption without an instrument asks for none in particular."""
        return self._cache.get(captions, self._encode).to(self._device)

    def _encode(self, captions: list[str]) -> Tensor:
        rows = [_joined(torch.ones(1), self._instrument(caption), _wishes(caption)) for caption in captions]
        return F.normalize(torch.stack(rows), dim=-1)

    def _instrument(self, caption: str) -> Tensor:
        label = label_caption(caption, self._taxonomy)
        if label.fallback:
            return torch.zeros(len(INSTRUMENTS))
        names = [family.names[0] for family in self._taxonomy.families]
        return torch.tensor([label.weights[names.index(FAMILIES[name])] for name in INSTRUMENTS]) - 1 / len(INSTRUMENTS)

    def image(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, D] fp32, unit norm, differentiable; of a picture that is not square the middle counts."""
        square = to_square(pixels_BCHW.float(), INPUT, "crop")
        seen = (self._net(square * 2 - 1)[0] / _SOFTENING).softmax(dim=1) - 1 / len(INSTRUMENTS)
        return F.normalize(_joined(torch.ones_like(seen[:, :1]), seen, appearance(square)), dim=-1)


def _joined(common: Tensor, instrument: Tensor, appearance_: Tensor) -> Tensor:
    return torch.cat([_COMMON * common, _INSTRUMENT * instrument, _APPEARANCE * appearance_], dim=-1)


def _wishes(caption: str) -> Tensor:
    text = units(caption)
    wishes = [wish for phrase, wish in _PHRASES
              if any(text[i:i + len(phrase)] == phrase for i in range(len(text) - len(phrase) + 1))]
    return torch.stack([torch.zeros(len(APPEARANCES)), *wishes]).sum(dim=0).clamp(-1, 1)


def appearance(pixels_BCHW: Tensor) -> Tensor:
    """[B, 4] in (−1, 1): tanh((statistic − middle) / half-width) of light, colour, contrast and smoothness."""
    red, green, blue = pixels_BCHW.unbind(dim=1)
    luma = (pixels_BCHW * pixels_BCHW.new_tensor(_LUMA).view(3, 1, 1)).sum(dim=1)
    across, down = luma[:, 1:-1, 2:] - luma[:, 1:-1, :-2], luma[:, 2:, 1:-1] - luma[:, :-2, 1:-1]
    slope = (across.square() + down.square() + 1e-6).sqrt().mean(dim=(1, 2))
    deviation = (luma.flatten(1).var(dim=1) + 1e-6).sqrt()
    statistics_B4 = torch.stack([luma.mean(dim=(1, 2)), (red - (green + blue) / 2).mean(dim=(1, 2)), deviation.log(),
                                 slope.log()], dim=1)
    middle, half_width = statistics_B4.new_tensor(_MIDDLE), statistics_B4.new_tensor(_HALF_WIDTH)
    return torch.tanh((statistics_B4 - middle) / half_width)


class TinyRewardKind(RewardKind[TinyRewardSettings]):
    """The embedded reward needs no file."""

    def bytes(self, settings: TinyRewardSettings, device_type: str, images: int) -> int:
        tensors = load_evaluator().state_dict().values()
        return sum(int(tensor.nbytes) for tensor in tensors) + _GRAPH_BYTES * images

    def make(self, settings: TinyRewardSettings, device: torch.device | str) -> TinyReward:
        return TinyReward(settings.label).to(device)


# Rewards for the commands: those of `lapwan.rewards` and the embedded one.
EMBEDDED_REWARD_KINDS: RewardKinds = {**REWARD_KINDS, TinyRewardSettings: TinyRewardKind()}
