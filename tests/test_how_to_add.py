"""The recipes "How to add a ..." are true: each test adds a kind in only the places that its recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lapwan.errors import UserError
from lapwan.rewards.base import EmbeddingCache, RewardKind, RewardKinds
from lapwan.rewards.build import REWARD_KINDS, build_rewards, check_rewards, reward_bytes
from lapwan.settings.rewards import REWARDS, RewardSettings, rewards_of
from lapwan.settings.srpo import SrpoSettings
from lapwan.tiny.resolve import resolve_base
from lapwan.train.srpo import recipe
from lapwan.train.srpo.plan import plan_run

CPU = torch.device("cpu")


# Reward, 1: settings (lapwan/settings/rewards.py), named in REWARDS.
class WarmthSettings(RewardSettings):
    """Redness of a picture, by the shades that a file lists."""

    example = "warmth=FILE"

    type: Literal["warmth"] = "warmth"
    path: Path


# Reward, 2: a file in lapwan/rewards/.
class Warmth:
    scale = 1.0
    english_text = False

    def __init__(self, name: str, shades: Tensor) -> None:
        self.name, self.shades, self._cache = name, shades, EmbeddingCache()

    def text(self, captions: Sequence[str]) -> Tensor:
        return self._cache.get(captions, lambda new: F.normalize(torch.stack([self.shades[len(new[0]) % 2]]), dim=-1))

    def image(self, pixels_BCHW: Tensor) -> Tensor:
        return F.normalize(pixels_BCHW.float().mean(dim=(2, 3)) + 0.1, dim=-1)

    def to(self, device: torch.device | str) -> Self:
        self.shades = self.shades.to(device)
        return self


class WarmthKind(RewardKind[WarmthSettings]):
    def files(self, settings: WarmthSettings) -> Sequence[Path]:
        return (settings.path,)

    def check(self, settings: WarmthSettings) -> None:
        if not settings.path.is_file():
            raise UserError(f"no such file: {settings.path}; it lists two shades")

    def bytes(self, settings: WarmthSettings, device_type: str, images: int) -> int:
        return 24 + 12 * images

    def make(self, settings: WarmthSettings, device: torch.device | str) -> Warmth:
        rows = [[float(value) for value in line.split()] for line in settings.path.read_text().splitlines()]
        return Warmth(settings.label, torch.tensor(rows)).to(device)


# Reward, 3: its row in REWARD_KINDS.
KINDS: RewardKinds = {**REWARD_KINDS, WarmthSettings: WarmthKind()}


class WarmSrpoSettings(SrpoSettings):
    rewards: rewards_of((*REWARDS, WarmthSettings))  # type: ignore[valid-type]


def warm_settings(folder: Path, reward: Any, **changes: Any) -> WarmSrpoSettings:
    (folder / "prompts.txt").write_text("a hook cuts\nscissors cut it\n", encoding="utf-8")
    (folder / "shades.txt").write_text("1 0.2 0.1\n0.2 0.9 0.4\n", encoding="utf-8")
    plain = {"output": folder / "run", "prompts": {"file": folder / "prompts.txt"}, "rewards": reward,
             "size": (32, 32), "steps": 1, "accumulate": 1, "held_out": {"count": 0}, "rollout": {"steps": 2},
             "device": "cpu", "targets": {"last_blocks": 1, "ffn_last_blocks": 1}}
    return WarmSrpoSettings.model_validate({**plain, **changes})


def test_a_reward(tmp_path):
    settings = warm_settings(tmp_path, f"warmth={tmp_path / 'shades.txt'}:0.5")
    assert settings.rewards == (WarmthSettings(path=tmp_path / "shades.txt", weight=0.5),)
    with pytest.raises(ValueError, match="write hps=FILE, clip=FOLDER, pickscore=FOLDER, tiny or warmth=FILE"):
        warm_settings(tmp_path, "heat=a")
    check_rewards(settings.rewards, KINDS)
    with pytest.raises(UserError, match="no such file"):
        check_rewards((WarmthSettings(path=tmp_path / "none"),), KINDS)
    with pytest.raises(UserError, match="'warmth' is not for this command"):
        check_rewards(settings.rewards)
    assert reward_bytes(settings.rewards, "cpu", 3, KINDS) == 60
    planned = plan_run(settings, resolve_base(settings.model), KINDS, CPU)
    rewards = build_rewards(settings.rewards, CPU, KINDS)
    trainer = recipe.prepare(settings, planned.base, planned.data, rewards, planned.memory, CPU)
    before = {name: value.detach().clone() for name, value in trainer.parameters.items()}
    trainer.fit()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.parameters.items())
