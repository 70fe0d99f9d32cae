"""Rewards from settings: build them, check their files, estimate their memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lapwan.errors import UserError
from lapwan.rewards.base import Reward, RewardKind, RewardKinds
from lapwan.rewards.clip import ClipFolder
from lapwan.rewards.open_clip import HpsFile
from lapwan.settings.base import type_of
from lapwan.settings.rewards import ClipSettings, HpsSettings, PickScoreSettings, RewardSettings

REWARD_KINDS: RewardKinds = {
    HpsSettings: HpsFile(),
    ClipSettings: ClipFolder("a CLIPModel's folder, such as laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    PickScoreSettings: ClipFolder("the folder of yuvalkirstain/PickScore_v1"),
}


def kind_of(settings: RewardSettings, kinds: RewardKinds = REWARD_KINDS) -> RewardKind[Any]:
    """The kind of a reward with these settings.

    Raises:
        UserError: a reward of a package above, which the caller has not added to `kinds`.
    """
    if type(settings) not in kinds:
        *first, last = map(type_of, kinds)
        raise UserError(f"the reward '{type_of(type(settings))}' is not for this command; "
                        f"give {', '.join(first)} or {last}")
    return kinds[type(settings)]


def build_rewards(
    rewards: Sequence[RewardSettings], device: torch.device | str, kinds: RewardKinds = REWARD_KINDS
) -> dict[str, Reward]:
    """Every reward by its label, on `device`.

    Raises:
        UserError: a file is missing or of the wrong kind.
    """
    return {settings.label: kind_of(settings, kinds).make(settings, device) for settings in rewards}


def check_rewards(rewards: Sequence[RewardSettings], kinds: RewardKinds = REWARD_KINDS) -> None:
    """Check the rewards' files without loading them.

    Raises:
        UserError: as `build_rewards`, as far as headers tell.
    """
    for settings in rewards:
        kind_of(settings, kinds).check(settings)


def reward_bytes(
    rewards: Sequence[RewardSettings], device_type: str, images: int, kinds: RewardKinds = REWARD_KINDS
) -> int:
    """Weights of all rewards, and the activations kept for the backward through `images` images, in bytes.

    Rewards run one after the other, but their graphs exist at the same time.

    Raises:
        UserError: a reward that is not of `kinds`.
    """
    return sum(kind_of(settings, kinds).bytes(settings, device_type, images) for settings in rewards)
