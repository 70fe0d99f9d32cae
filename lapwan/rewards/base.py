"""The interface of rewards: embeddings and a scale, not scores, so that one preference formula works for all of them.

The formula is in `losses.preference`.

How to add a reward:
1. its settings: a subclass of `RewardSettings` in `lapwan/settings/rewards.py`, named in `REWARDS` there;
2. a file in this package: a class with the members of `Reward` below (`EmbeddingCache` keeps its text embeddings), and
   a `RewardKind` with its files, their check, its bytes and how it is made from its settings;
3. a row in `build.REWARD_KINDS`, by its settings (a reward of a package above, such as the tiny one, is added to it by
   whoever runs the command);
4. a test: unit norm, a gradient to the pixels, a matching caption above a wrong one.

Shapes: B images, N captions, D dimensions of the embedding, H, W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from lapwan import console
from lapwan.data.prompts import count_chinese
from lapwan.settings.rewards import RewardSettings

SettingsOfKind = TypeVar("SettingsOfKind", bound=RewardSettings)


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


class RewardKind(ABC, Generic[SettingsOfKind]):
    """What a kind of reward needs, by its settings. A kind without files only has to be made."""

    def files(self, settings: SettingsOfKind) -> Sequence[Path]:
        """Its files and folders, by which a change of weights is noticed."""
        return ()

    def check(self, settings: SettingsOfKind) -> None:
        """Check its files without loading them.

        Raises:
            UserError: as `make`, as far as headers tell.
        """

    def bytes(self, settings: SettingsOfKind, device_type: str, images: int) -> int:
        """Bytes of its weights, and of the activations kept for the backward through `images` images.

        Args:
            settings: of the reward.
            device_type: cpu or cuda.
            images: those of a backward.
        """
        return 0

    @abstractmethod
    def make(self, settings: SettingsOfKind, device: torch.device | str) -> Reward:
        """The reward on the device.

        Args:
            settings: of the reward.
            device: of its weights.

        Raises:
            UserError: a file is missing or of the wrong kind.
        """


RewardKinds = Mapping[type[RewardSettings], RewardKind[Any]]


class EmbeddingCache:
    """Text embeddings by caption, on the CPU: a caption is encoded once in a whole run."""

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}

    def get(self, captions: Sequence[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
        """[N, D] in the order of `captions`.

        `encode` is called with one new caption at a time: the last bits of a batch depend on its size, and a resumed
        run has its captions in other batches.

        Args:
            captions: N texts.
            encode: texts -> [N, D].
        """
        for caption in captions:
            if caption not in self._rows:
                with torch.no_grad():
                    self._rows[caption] = encode([caption])[0].float().cpu()
        return torch.stack([self._rows[caption] for caption in captions])


def score(reward: Reward, pixels_BCHW: Tensor, captions: Sequence[str]) -> Tensor:
    """scale·⟨image, text⟩ of each image with its caption: [B]; CLIP score and PickScore as published.

    Args:
        reward: the reward.
        pixels_BCHW: [B, 3, H, W] in [0, 1], on the reward's device.
        captions: one per image.
    """
    return reward.scale * (reward.image(pixels_BCHW) * reward.text(captions)).sum(dim=-1)


def warn_chinese(rewards: Mapping[str, Reward], captions: Iterable[str]) -> None:
    """Warn if captions are Chinese and a reward's text encoder knows English only: it would score by noise.

    Args:
        rewards: by name.
        captions: of the training or evaluation.
    """
    texts = list(captions)
    count = count_chinese(texts)
    english = [name for name, reward in rewards.items() if reward.english_text]
    if count and english:
        console.warn(f"{count} of {len(texts)} captions hold Chinese, but the text encoder of {', '.join(english)} "
                     "knows English only; its preference will hardly depend on them. Translate the captions.")


def select_frames(num_frames: int, rule: str | int) -> list[int]:
    """The frames of a video that are scored: `all`, `first`, or k evenly spaced from the first to the last.

    Args:
        num_frames: frames of the video.
        rule: `all`, `first`, or k.

    Returns:
        Indices in rising order.
    """
    if rule == "first" or num_frames == 1:
        return [0]
    if rule == "all":
        return list(range(num_frames))
    count = min(int(rule), num_frames)
    if count == 1:
        return [0]
    return sorted({round(i * (num_frames - 1) / (count - 1)) for i in range(count)})
