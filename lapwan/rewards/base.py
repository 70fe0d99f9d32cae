"""The interface of rewards: embeddings and a scale, not scores, so that one preference formula works for all of them.

The formula is in `losses.preference`.

How to add a reward:
1. a class with the members of `Reward` below, in a file of this package (`EmbeddingCache` keeps its text embeddings);
2. a settings class in `settings.rewards`, named in its union and in `_TYPES`;
3. a case in `build.build_rewards` (or pass a maker as `others`, if it is in a package above, as the tiny one is);
4. the check of its files in `build.check_rewards` and its size in `build.reward_bytes`;
5. a test: unit norm, a gradient to the pixels, a matching caption above a wrong one.

Shapes: B images, N captions, D dimensions of the embedding, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from lapwan import console
from lapwan.data.prompts import count_chinese


class Reward(Protocol):
    """How well an image fits a text, from embeddings: score = scale·⟨image, text⟩.

    `scale` turns a cosine into the reward's usual score. `english_text`: its text encoder knows English only.
    """

    @property
    def name(self) -> str: ...
    @property
    def scale(self) -> float: ...
    @property
    def english_text(self) -> bool: ...

    def text(self, captions: Sequence[str]) -> Tensor:
        """[N, D] fp32 of unit norm on the reward's device, without gradient; each caption is encoded once per run."""
        ...

    def image(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, D] fp32 of unit norm, differentiable; pixels in [0, 1] of any size on the reward's device."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move the weights."""
        ...


class EmbeddingCache:
    """Text embeddings by caption, on the CPU: a caption is encoded once in a whole run."""

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}

    def get(self, captions: Sequence[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
        """[N, D] in the order of `captions`.

        `encode` is called with one new caption at a time: the last bits of a batch depend on its size, and a resumed
        run has its captions in other batches.
        """
        for caption in captions:
            if caption not in self._rows:
                with torch.no_grad():
                    self._rows[caption] = encode([caption])[0].float().cpu()
        return torch.stack([self._rows[caption] for caption in captions])


def score(reward: Reward, pixels_BCHW: Tensor, captions: Sequence[str]) -> Tensor:
    """scale·⟨image, text⟩ of each image with its caption: [B]; CLIP score and PickScore as published."""
    return reward.scale * (reward.image(pixels_BCHW) * reward.text(captions)).sum(dim=-1)


def warn_chinese(rewards: Mapping[str, Reward], captions: Iterable[str]) -> None:
    """Warn if captions are Chinese and a reward's text encoder knows English only: it would score by noise."""
    texts = list(captions)
    count = count_chinese(texts)
    english = [name for name, reward in rewards.items() if reward.english_text]
    if count and english:
        console.warn(f"{count} of {len(texts)} captions hold Chinese, but the text encoder of {', '.join(english)} "
                     "knows English only; its preference will hardly depend on them. Translate the captions.")


def select_frames(num_frames: int, rule: str | int) -> list[int]:
    """The frames of a video that are scored: `all`, `first`, or k evenly spaced from the first to the last."""
    if rule == "first" or num_frames == 1:
        return [0]
    if rule == "all":
        return list(range(num_frames))
    count = min(int(rule), num_frames)
    if count == 1:
        return [0]
    return sorted({round(i * (num_frames - 1) / (count - 1)) for i in range(count)})
