"""Rewards from settings: build them, check their files, estimate their memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lapwan.errors import UserError
from lapwan.rewards.base import Reward
from lapwan.rewards.clip import ClipReward, find_tokenizer, load_clip_folder, load_tokenizer, read_clip_config
from lapwan.rewards.open_clip import VIT_H_14, load_checkpoint, read_checkpoint
from lapwan.settings.rewards import ClipSettings, HpsSettings, PickScoreSettings, RewardSettings

if TYPE_CHECKING:
    from transformers import CLIPConfig

_FOLDERS = {"clip": "a CLIPModel's folder, such as laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            "pickscore": "the folder of yuvalkirstain/PickScore_v1"}
# Makes a reward of a package above from its settings and a device.
Maker = Callable[[Any, torch.device | str], Reward]


def build_rewards(rewards: Sequence[RewardSettings], device: torch.device | str,
                  others: Mapping[str, Maker] | None = None) -> dict[str, Reward]:
    """Every reward by its label, on `device`.

    Args:
        others: makers of rewards that are in packages above, by the type in their settings.

    Raises:
        UserError: a file is missing or of the wrong kind.
    """
    built: dict[str, Reward] = {}
    for settings in rewards:
        if settings.type in (others or {}):
            built[settings.label] = others[settings.type](settings, device)  # type: ignore[index]
        elif isinstance(settings, HpsSettings | ClipSettings | PickScoreSettings):
            built[settings.label] = _clip_reward(settings, device)
        else:
            raise UserError(f"the reward '{settings.type}' is not for this command; give hps, clip or pickscore")
    return built


def _dtype(name: str, device_type: str) -> torch.dtype:
    fp32 = name == "fp32" or (name == "auto" and device_type == "cpu")
    return torch.float32 if fp32 else torch.bfloat16


def _clip_reward(settings: HpsSettings | ClipSettings | PickScoreSettings, device: torch.device | str) -> ClipReward:
    dtype = _dtype(settings.dtype, torch.device(device).type)
    tokenizer_path = find_tokenizer(settings.tokenizer, settings.path, _tokenizer_key(settings))
    if isinstance(settings, HpsSettings):
        model = load_checkpoint(settings.path, dtype)
    else:
        model = load_clip_folder(settings.path, dtype, _FOLDERS[settings.type])
    text = model.config.text_config
    tokenizer = load_tokenizer(tokenizer_path, int(text.vocab_size), int(text.max_position_embeddings))
    # HPS is published as the plain cosine; the others with the model's logit scale.
    scale = 1.0 if isinstance(settings, HpsSettings) else None
    return ClipReward(settings.label, model, tokenizer, settings.preprocess, scale).to(device)


def _tokenizer_key(settings: HpsSettings | ClipSettings | PickScoreSettings) -> str:
    return f'tokenizer = "FOLDER" in the table of the reward {settings.label}'


def check_rewards(rewards: Sequence[RewardSettings]) -> None:
    """Check the rewards' files without loading them.

    Raises:
        UserError: as `build_rewards`, as far as headers tell.
    """
    for settings in rewards:
        if isinstance(settings, HpsSettings):
            read_checkpoint(settings.path)
        elif isinstance(settings, ClipSettings | PickScoreSettings):
            read_clip_config(settings.path, _FOLDERS[settings.type])
        if isinstance(settings, HpsSettings | ClipSettings | PickScoreSettings):
            find_tokenizer(settings.tokenizer, settings.path, _tokenizer_key(settings))


def reward_bytes(rewards: Sequence[RewardSettings], device_type: str, images: int) -> int:
    """Weights of all rewards, and the activations kept for the backward through `images` images, in bytes.

    A block of a frozen pre-norm transformer keeps 6 widths per token (both norms' inputs, q, k, v and the attention's
    output) and the activation's input. Rewards run one after the other, but their graphs exist at the same time.
    """
    from accelerate import init_empty_weights
    from transformers import CLIPModel

    total = 0
    for settings in rewards:
        if not isinstance(settings, HpsSettings | ClipSettings | PickScoreSettings):
            continue  # the tiny one: a megabyte
        hps = isinstance(settings, HpsSettings)
        config = VIT_H_14.config() if hps else read_clip_config(settings.path, _FOLDERS[settings.type])
        with init_empty_weights():
            weights = sum(p.numel() for p in CLIPModel(config).parameters())
        total += (weights + images * activation_elements(config)) * _dtype(settings.dtype, device_type).itemsize
    return total


def activation_elements(config: CLIPConfig) -> int:
    """Elements that the vision tower keeps for the backward through one image."""
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    block = 6 * vision.hidden_size + vision.intermediate_size
    return int(tokens * (vision.num_hidden_layers * block + 2 * vision.hidden_size))  # and the first norm
