"""The recipes "How to add a ..." are true: each test adds a kind in only the places that its recipe names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Self

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lapwan.data.taxonomy import load_taxonomy
from lapwan.errors import UserError
from lapwan.moe.mixture_file import read_mixture
from lapwan.moe.router import Router, RouterShape
from lapwan.rewards.base import EmbeddingCache, RewardKind, RewardKinds
from lapwan.rewards.build import build_rewards, check_rewards, reward_bytes
from lapwan.sampling.expert_mix import choose_mix
from lapwan.sampling.request import Request, make_request
from lapwan.settings.generate import VideoSettings
from lapwan.settings.optimizers import OPTIMIZERS, OptimizerSettings, ScheduleSettings, optimizer_of
from lapwan.settings.rewards import REWARDS, RewardSettings, rewards_of
from lapwan.settings.srpo import SrpoSettings
from lapwan.settings.train_moe import RouterSettings, TrainMoeSettings
from lapwan.tiny.resolve import resolve_base
from lapwan.tiny.reward import EMBEDDED_REWARD_KINDS
from lapwan.train.moe import recipe as moe_recipe
from lapwan.train.objective import ParameterGroup
from lapwan.train.optimizers import MasterWeights, build, check_optimizer, describe_optimizer, lr_groups
from lapwan.train.recipe import read_data
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
KINDS: RewardKinds = {**EMBEDDED_REWARD_KINDS, WarmthSettings: WarmthKind()}


# Optimizer, 1: settings (lapwan/settings/optimizers.py), named in OPTIMIZERS.
class SignSettings(OptimizerSettings):
    """Steps of one size in the direction of the gradient's sign."""

    own_schedule = "whose steps have one size"

    type: Literal["sign"] = "sign"
    lr: float = 1e-3

    def describe(self) -> str:
        return f"sign, steps of {self.lr:g}"


# Optimizer, 2: its case of `build`.
class SignDescent(torch.optim.Optimizer):
    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad.sign())


@build.register
def _sign(settings: SignSettings, parts: Sequence[ParameterGroup], master: MasterWeights | None) -> SignDescent:
    return SignDescent(lr_groups(settings.lr, parts))


class ToySrpoSettings(SrpoSettings):
    rewards: rewards_of((*REWARDS, WarmthSettings))  # type: ignore[valid-type]
    optimizer: optimizer_of((*OPTIMIZERS, SignSettings))  # type: ignore[valid-type]


def toy_settings(folder: Path, reward: Any, **changes: Any) -> ToySrpoSettings:
    (folder / "prompts.txt").write_text("a hook cuts\nscissors cut it\n", encoding="utf-8")
    (folder / "shades.txt").write_text("1 0.2 0.1\n0.2 0.9 0.4\n", encoding="utf-8")
    plain = {"output": folder / "run", "prompts": {"file": folder / "prompts.txt"}, "rewards": reward,
             "size": (32, 32), "steps": 1, "accumulate": 1, "held_out": {"count": 0}, "rollout": {"steps": 2},
             "device": "cpu", "targets": {"last_blocks": 1, "ffn_last_blocks": 1}}
    return ToySrpoSettings.model_validate({**plain, **changes})


def test_a_reward(tmp_path):
    settings = toy_settings(tmp_path, f"warmth={tmp_path / 'shades.txt'}:0.5")
    assert settings.rewards == (WarmthSettings(path=tmp_path / "shades.txt", weight=0.5),)
    with pytest.raises(ValueError, match="write hps=FILE, clip=FOLDER, pickscore=FOLDER, tiny or warmth=FILE"):
        toy_settings(tmp_path, "heat=a")
    check_rewards(settings.rewards, KINDS)
    with pytest.raises(UserError, match="no such file"):
        check_rewards((WarmthSettings(path=tmp_path / "none"),), KINDS)
    with pytest.raises(UserError, match="'warmth' is not for this command"):
        check_rewards(settings.rewards)
    assert reward_bytes(settings.rewards, "cpu", 3, KINDS) == 60
    assert largest_step(settings) > 0


def largest_step(settings: SrpoSettings) -> float:
    """The largest change of a trained number in a run."""
    planned = plan_run(settings, resolve_base(settings.model), KINDS, CPU)
    rewards = build_rewards(settings.rewards, CPU, KINDS)
    trainer = recipe.prepare(settings, planned.base, planned.data, rewards, planned.memory, CPU)
    before = {name: value.detach().clone() for name, value in trainer.parameters.items()}
    trainer.fit()
    return max(float((value.detach() - before[name]).abs().max()) for name, value in trainer.parameters.items())


def test_an_optimizer(tmp_path):
    settings = toy_settings(tmp_path, "tiny", optimizer={"type": "sign", "lr": 0.125})
    assert settings.optimizer == SignSettings(lr=0.125) and settings.optimizer.predicted_lr() == 0.125
    assert describe_optimizer(settings.optimizer, ScheduleSettings()) == "sign, steps of 0.125"
    with pytest.raises(UserError, match="no effect on sign, whose steps have one size"):
        check_optimizer(settings.optimizer, ScheduleSettings(name="cosine"))
    with pytest.raises(ValueError, match=r"a full fine-tune takes optimizer.type = 'adamw', not 'sign'"):
        toy_settings(tmp_path, "tiny", optimizer={"type": "sign"}, train="full")
    assert largest_step(settings) == 0.125


# Router, 1: a class (lapwan/moe/router.py) with its kind.
class PriorRouter(Router, kind="prior"):
    """The same probabilities for every prompt: p = softmax(b)."""

    reads_text = True

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.bias_E = nn.Parameter(torch.arange(experts) / 10)

    @classmethod
    def make(cls, shape: RouterShape) -> Router:
        return cls(shape.experts)

    def forward(self, text: Sequence[Tensor], labels_BE: Tensor | None, sigma_B: Tensor | None = None) -> Tensor:
        return torch.softmax(self.bias_E, dim=0).expand(len(text), -1)


# Router, 2: its kind in RouterSettings.
class ToyRouterSettings(RouterSettings):
    kind: Literal["text", "linear", "label", "rule", "prior"] = "text"  # type: ignore[assignment]


class ToyMoeSettings(TrainMoeSettings):
    router: ToyRouterSettings = ToyRouterSettings()  # type: ignore[assignment]


def test_a_router(tmp_path, t2v_cache):
    settings = ToyMoeSettings.model_validate({
        "model": "tiny", "output": tmp_path / "run", "data": {"cache": t2v_cache}, "steps": 1,
        "router": {"kind": "prior"}, "noise_experts": ["low"], "targets": {"last_blocks": 1, "ffn_last_blocks": 1}})
    base, taxonomy = resolve_base(settings.model), load_taxonomy(settings.taxonomy)
    data = read_data(settings, base)
    assert moe_recipe.mixture_rows(settings, data, taxonomy)[-1].text.startswith("prior, top 2")
    settings.output.mkdir()
    trainer = moe_recipe.prepare(settings, base, data, taxonomy, CPU)
    trainer.fit()
    mixture = read_mixture(settings.output / "lapwan.safetensors", base)
    trained = mixture.router.state_dict()["bias_E"]
    assert not torch.equal(trained, torch.arange(len(mixture.families)) / 10)
    mix = choose_mix(mixture, "a hook cuts", None, lambda: torch.zeros(3, base.text_dim))
    expected = torch.softmax(trained, dim=0) * torch.tensor([0, 0, 1, 1])
    assert mix.source == "router" and torch.allclose(mix.mix_1E[0], expected / expected.sum())


def test_an_option_of_a_video():
    """A field of the settings and one of the same name in the request are all that it takes."""
    names = {field.name for field in fields(Request)} & set(VideoSettings.model_fields)
    assert set(VideoSettings.model_fields) - names == {"instrument_hint", "video"}  # a hint, and decoded frames
    given = {"prompt": "a hook", "num_frames": 5, "size": (32, 48), "steps": 3, "negative_prompt": "", "boundary": 0.5,
             "guidance_interval": (0.2, 0.9), "flow_shift": 2.0, "sampler": "euler", "seed": 7, "alpha_base": 0.5,
             "alpha_expert": {"hook": 2.0}}
    request = make_request(resolve_base("tiny").spec, VideoSettings(**given, instrument_hint="hook"))
    assert {name: getattr(request, name) for name in given} == given and request.hint == "hook"
    left = names - {*given, "image", "last_image", "start_sigma", "guidance", "sigmas", "first_block_cache"}
    assert left == set()
