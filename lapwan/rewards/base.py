"""The seam of rewards: embeddings and a scale, not scores, so that one preference formula serves them all.

The formula stands in `losses.preference`.

How to add a reward:
1. a class with what `Reward` below asks for, in a file of this package (`EmbeddingCache` keeps its texts);
2. a settings class in `settings.reward`, named in its union and in `_TYPES`;
3. a case in `build.build_rewards` (or pass a maker as `others`, if it lives in a later package, as the tiny one does);
4. its files' check in `build.check_rewards` and its size in `build.reward_bytes`;
5. a test: unit norm, a gradient to the pixels, a matching caption above a wrong one.

Shapes: B images, N captions, D dimensions of the embedding, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from lapwan import console
from lapwan.data.prompts import holds_chinese


class Reward(Protocol):
    """A judge of how well a picture fits a text, by embeddings.

    `scale` makes its usual score of a cosine: score = scale·⟨image, text⟩. `english_text`: its text encoder knows
    English only.
    """

    @property
    def name(self) -> str: ...
    @property
    def scale(self) -> float: ...
    @property
    def english_text(self) -> bool: ...

    def text(self, captions: Sequence[str]) -> Tensor:
        """[N, D] fp32 of unit norm on the reward's device, without gradient; each caption is encoded once."""
        ...

    def image(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, D] fp32 of unit norm, differentiable; pixels in [0, 1] of any size on the reward's device."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move the weights."""
        ...


class EmbeddingCache:
    """Text embeddings by caption, on the CPU: a caption costs one pass of the encoder in a whole run."""

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}

    def get(self, captions: Sequence[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
        """[N, D] in the order of `captions`.

        `encode` is called for those not yet seen, one at a time: the last bits of a batch depend on its size, and a
        resumed run meets its captions in other batches.
        """
        for caption in captions:
            if caption not in self._rows:
                with torch.no_grad():
                    self._rows[caption] = encode([caption])[0].float().cpu()
        return torch.stack([self._rows[caption] for caption in captions])


def score(reward: Reward, pixels_BCHW: Tensor, captions: Sequence[str]) -> Tensor:
    """scale·⟨image, text⟩ of each picture with its caption: [B]; CLIP score and PickScore as they are published."""
    return reward.scale * (reward.image(pixels_BCHW) * reward.text(captions)).sum(dim=-1)


def warn_chinese(rewards: Mapping[str, Reward], captions: Iterable[str]) -> None:
    """Say once where captions are Chinese and a reward reads English only: it would judge by noise."""
    texts = list(captions)
    count = holds_chinese(texts)
    english = [name for name, reward in rewards.items() if reward.english_text]
    if count and english:
        console.warn(f"{count} of {len(texts)} captions hold Chinese, but the text encoder of {', '.join(english)} "
                     "knows English only; its preference will hardly depend on them. Translate the captions.")
