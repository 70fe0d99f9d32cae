"""From settings to rewards: what is asked for, whether its files are there, how much memory it takes."""

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
# A reward that lives in a later package, by its settings' type: made from its settings and the device.
Maker = Callable[[Any, torch.device | str], Reward]


def build_rewards(rewards: Sequence[RewardSettings], device: torch.device | str,
                  others: Mapping[str, Maker] | None = None) -> dict[str, Reward]:
    """Every reward by its label, on `device`; `others` makes those types that later packages own.

    Raises:
        UserError: a file that is missing or of the wrong kind.
    """
    made: dict[str, Reward] = {}
    for one in rewards:
        if one.type in (others or {}):
            made[one.label] = others[one.type](one, device)  # type: ignore[index]
        elif isinstance(one, HpsSettings | ClipSettings | PickScoreSettings):
            made[one.label] = _clip_reward(one, device)
        else:
            raise UserError(f"the reward '{one.type}' is not for this command; give hps, clip or pickscore")
    return made


def _dtype(said: str, device_type: str) -> torch.dtype:
    wide = said == "fp32" or (said == "auto" and device_type == "cpu")
    return torch.float32 if wide else torch.bfloat16


def _clip_reward(one: HpsSettings | ClipSettings | PickScoreSettings, device: torch.device | str) -> ClipReward:
    dtype = _dtype(one.dtype, torch.device(device).type)
    place = find_tokenizer(one.tokenizer, one.path, _tokenizer_key(one))
    if isinstance(one, HpsSettings):
        model = load_checkpoint(one.path, dtype)
    else:
        model = load_clip_folder(one.path, dtype, _FOLDERS[one.type])
    text = model.config.text_config
    tokenizer = load_tokenizer(place, int(text.vocab_size), int(text.max_position_embeddings))
    # HPS is published as the plain cosine; the others with the model's logit scale.
    reward = ClipReward(one.label, model, tokenizer, one.preprocess, 1.0 if isinstance(one, HpsSettings) else None)
    return reward.to(device)


def _tokenizer_key(one: HpsSettings | ClipSettings | PickScoreSettings) -> str:
    return f'tokenizer = "FOLDER" in the table of the reward {one.label}'


def check_rewards(rewards: Sequence[RewardSettings]) -> None:
    """Look at the files without loading them.

    Raises:
        UserError: as `build_rewards` would, as far as headers tell.
    """
    for one in rewards:
        if isinstance(one, HpsSettings):
            read_checkpoint(one.path)
        elif isinstance(one, ClipSettings | PickScoreSettings):
            read_clip_config(one.path, _FOLDERS[one.type])
        if isinstance(one, HpsSettings | ClipSettings | PickScoreSettings):
            find_tokenizer(one.tokenizer, one.path, _tokenizer_key(one))


def reward_bytes(rewards: Sequence[RewardSettings], device_type: str, images: int) -> int:
    """Weights of all rewards, and what the backward through `images` pictures keeps, in bytes.

    A block of a frozen pre-norm transformer keeps 6 widths a token (both norms' inputs, q, k, v and the attention's
    output) and the activation's input. Rewards run one after the other, but their graphs live together.
    """
    from accelerate import init_empty_weights
    from transformers import CLIPModel

    total = 0
    for one in rewards:
        if not isinstance(one, HpsSettings | ClipSettings | PickScoreSettings):
            continue  # the tiny one: a megabyte
        config = VIT_H_14.config() if isinstance(one, HpsSettings) else read_clip_config(one.path, _FOLDERS[one.type])
        with init_empty_weights():
            weights = sum(p.numel() for p in CLIPModel(config).parameters())
        total += (weights + images * kept_elements(config)) * _dtype(one.dtype, device_type).itemsize
    return total


def kept_elements(config: CLIPConfig) -> int:
    """Elements that one picture's graph keeps in the vision tower."""
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    block = 6 * vision.hidden_size + vision.intermediate_size
    return int(tokens * (vision.num_hidden_layers * block + 2 * vision.hidden_size))  # and the first norm
