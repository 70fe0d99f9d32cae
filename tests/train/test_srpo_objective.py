"""The preference objective: closed forms with a known velocity, what words and bounds act on, real gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import randomise

from lapwan import rng
from lapwan.caching.collate import Batch
from lapwan.commands.srpo import plan
from lapwan.losses import flow
from lapwan.models.spec import ModelSpec
from lapwan.names import Band, NoiseExpert
from lapwan.settings.rewards import TinyRewardSettings
from lapwan.settings.srpo import SrpoSettings
from lapwan.tiny.reward import TinyRewardKind
from lapwan.train.objective import Draws, SigmaRule, make_draws
from lapwan.train.srpo import recipe
from lapwan.train.srpo.objective import AlignedNoiseExpert, PreferenceRule, RewardModels, SrpoObjective
from lapwan.train.srpo.rollout import Rollout, RolloutRule

LOW = NoiseExpert.LOW
BAND = Band(0.7, 0.874999)
F64 = torch.float64


class PlainReward:
    """Embeddings in fp64: of a picture its mean colours, of a text numbers keyed by its letters; remembers texts."""

    name, scale, english_text = "plain", 1.0, False

    def __init__(self) -> None:
        self.asked: list[str] = []

    def text(self, captions: Sequence[str]) -> Tensor:
        self.asked += captions
        rows = [torch.randn(3, generator=rng.generator("text", one), dtype=F64) for one in captions]
        return nn.functional.normalize(torch.stack(rows), dim=-1)

    def image(self, pixels_BCHW: Tensor) -> Tensor:
        return nn.functional.normalize(pixels_BCHW.mean(dim=(2, 3)), dim=-1)

    def to(self, device: torch.device | str) -> PlainReward:
        return self


class Stub(SrpoObjective):
    """A velocity that is known: the true one and a shift that is trained; remembers what it was asked with."""

    def __init__(self, rule: PreferenceRule, reward: PlainReward, truth: Tensor) -> None:
        self.shift = nn.Parameter(torch.zeros_like(truth))
        self.truth, self.estimates, self.seen = truth, [], []
        reward_models = RewardModels({"plain": reward}, {"plain": 1.0}, self._decode)
        trained = {LOW: AlignedNoiseExpert(None, {"shift": self.shift})}
        super().__init__(trained, reward_models, rule, lambda folder, step: [])

    def _decode(self, latents_BCTHW: Tensor) -> Tensor:
        self.estimates.append(latents_BCTHW)
        return torch.tanh(latents_BCTHW[:, :3, 0]).unsqueeze(1)

    def velocity(
        self, noise_expert: NoiseExpert, x: Tensor, sigma_B: Tensor, text: Any, condition: Any = None
    ) -> Tensor:
        self.seen.append((x, sigma_B, *text))
        return self.truth + self.shift


def rule(**changes: Any) -> PreferenceRule:
    return PreferenceRule(**{"interval": {LOW: BAND}, "whole": Band(0.7, 0.95), "positive": ("Real", "Detail"),
                             "negative": ("Flat", "Oil"), **changes})


def sample(captions: tuple[str, ...], numbers: Sequence[int], own: PreferenceRule) -> tuple[Batch, Draws]:
    generator = torch.Generator().manual_seed(4)
    count = len(captions)
    x0 = torch.randn(count, 16, 1, 4, 4, generator=generator, dtype=F64)
    nothing_B = torch.zeros(count, dtype=torch.bool)
    text = tuple(torch.randn(3 + i, 8, generator=generator, dtype=F64) for i in range(count))
    batch = Batch(captions, x0, text, None, None, nothing_B, None, captions)
    draws = make_draws(batch, [(1, "low", n, c) for n, c in zip(numbers, captions, strict=True)],
                       SigmaRule(band=own.interval[LOW]))
    return batch, draws


@pytest.mark.parametrize("branches", ["denoise", "inversion"])
def test_the_true_velocity_is_recovered_exactly_and_an_error_with_its_gain(branches):
    own = rule(branches=branches)
    batch, draws = sample(("a", "b"), (0, 5), own)
    truth = flow.velocity_target(batch.latents_BCTHW, draws.noise_BCTHW.double())
    stub = Stub(own, PlainReward(), truth)
    with stub.loss(LOW, batch, draws):
        torch.testing.assert_close(stub.estimates[0], batch.latents_BCTHW, rtol=0, atol=1e-12)
    error = torch.randn(truth.shape, generator=torch.Generator().manual_seed(5), dtype=F64)
    stub.shift.data = error
    with stub.loss(LOW, batch, draws):
        drawn = stub.preference_draws(LOW, batch, draws)
        c = (drawn.sigma_e_B - drawn.sigma_star_B).abs() / (1 - drawn.sigma_star_B)
        sign = -1 if branches == "denoise" else 1
        want = batch.latents_BCTHW + sign * c.view(-1, 1, 1, 1, 1) * error
        torch.testing.assert_close(stub.estimates[1], want, rtol=0, atol=1e-12)
        assert bool((c > 0).all())


def test_both_branches_push_the_velocity_the_same_way():
    gradients = []
    for branches in ("denoise", "inversion"):
        own = rule(branches=branches, discount_denoise=(0.0, 0.0), discount_inversion=(0.0, 0.0), margin=9.0)
        batch, draws = sample(("a",), (0,), own)
        stub = Stub(own, PlainReward(), flow.velocity_target(batch.latents_BCTHW, draws.noise_BCTHW.double()))
        with stub.loss(LOW, batch, draws) as loss:
            loss.total_B.sum().backward()
        assert stub.shift.grad is not None and float(stub.shift.grad.norm()) > 0
        drawn = stub.preference_draws(LOW, batch, draws)
        gradients.append(stub.shift.grad / ((drawn.sigma_e_B - drawn.sigma_star_B).abs() / (1 - drawn.sigma_star_B)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_control_words_reach_the_reward_and_nothing_else():
    found = []
    for words in ((("Real",), ("Flat",)), (("明亮",), ("Oil",))):
        own, reward = rule(positive=words[0], negative=words[1]), PlainReward()
        batch, draws = sample(("hook cuts", "scissors cut"), (0, 1), own)
        stub = Stub(own, reward, flow.velocity_target(batch.latents_BCTHW, draws.noise_BCTHW.double()))
        with stub.loss(LOW, batch, draws) as loss:
            found.append((stub.seen[0], loss.total_B.detach()))
        assert sorted(set(reward.asked)) == sorted(
            f"{word}. {caption}" for caption in batch.captions for word in (words[0][0], words[1][0]))
    (first, loss_a), (second, loss_b) = found
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "the model saw something of the words"
    assert not torch.equal(loss_a, loss_b)


@pytest.mark.parametrize("interval", [BAND, Band(0.875, 0.95), Band(0.7, 0.7215)])
def test_both_sigmas_stay_in_the_interval_and_near_each_other(interval):
    own = rule(interval={LOW: interval})
    captions = tuple(f"c{i}" for i in range(1500))
    batch, draws = sample(captions, range(1500), own)
    drawn = Stub(own, PlainReward(), batch.latents_BCTHW).preference_draws(LOW, batch, draws)
    for sigma_B in (drawn.sigma_e_B, drawn.sigma_star_B):
        assert float(sigma_B.min()) >= interval.low and float(sigma_B.max()) <= interval.high
    apart = drawn.sigma_e_B - drawn.sigma_star_B
    assert bool((apart.abs() > 0).all()) and float(apart.abs().max()) <= own.reach + 1e-12
    assert torch.equal(apart > 0, drawn.denoise_B) and int(drawn.denoise_B.sum()) == 750
    middle = (interval.low + interval.high) / 2
    assert 0.4 < float((drawn.sigma_star_B > middle).double().mean()) < 0.6
    words = [text.split(".")[0] for text in drawn.positive]
    assert 600 < words.count("Real") < 900


def settings_for(tmp_path: Path, **changes: Any) -> SrpoSettings:
    prompts = tmp_path / "prompts.txt"
    if not prompts.exists():  # written once: processes that share the folder would read it half written
        prompts.write_text("剪刀剪断血管\n电凝钩切割组织\n吸引器清理积血\n抓钳夹住胆囊\n", encoding="utf-8")
    plain: dict[str, Any] = {
        "output": tmp_path / "run", "prompts": {"file": prompts}, "rewards": "tiny", "size": (32, 32), "steps": 2,
        "accumulate": 2, "held_out": {"count": 0}, "rollout": {"steps": 2}, "device": "cpu",
        "targets": {"last_blocks": 2, "ffn_last_blocks": 1},
    }
    return SrpoSettings.model_validate({**plain, **changes})


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    def made(**changes: Any) -> Any:
        settings = settings_for(tmp_path, **changes)
        planned = plan(settings, torch.device("cpu"))
        settings.output.mkdir(exist_ok=True)
        rewards = {"tiny": TinyRewardKind().make(TinyRewardSettings(), "cpu")}
        return recipe.prepare(settings, planned.base, planned.data, rewards, planned.memory, torch.device("cpu"))
    return made


@pytest.mark.parametrize("changes", [
    {}, {"train": "full"}, {"noise_experts": "both", "num_frames": 5, "preference": {"frames": 2}}, {"kl_weight": 1.0},
    {"activation_checkpointing": True}, {"dtype": "nf4"},
], ids=["lora", "full", "both video", "kl", "checkpointing", "nf4"])
def test_the_gradient_reaches_every_trained_tensor(make, changes):
    trainer = make(**changes)
    randomise(trainer)
    for noise_expert in trainer.data.streams:
        for parameter in trainer.parameters.values():
            parameter.grad = None
        batch = trainer.data.load_batch([0, 1])
        keys = [(1, noise_expert.value, n, own) for n, own in enumerate(batch.ids)]
        draws = make_draws(batch, keys, trainer.data.streams[noise_expert].sigma_rule)
        [batch] = trainer.objective.prepare(noise_expert, [batch], draws=[draws])
        with trainer.objective.loss(noise_expert, batch, draws) as loss:
            loss.total_B.sum().backward()
        mine = {n: p for n, p in trainer.parameters.items() if n.startswith(f"{noise_expert.value}.")}
        without = [n for n, p in mine.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
        assert mine and not without
        assert all(p.grad is None for n, p in trainer.parameters.items() if n not in mine)
        assert ("loss/kl" in loss.terms) == ("kl_weight" in changes)


def test_a_batch_of_two_is_two_of_one_in_fp64(make):
    trainer = make(num_frames=5)
    randomise(trainer)
    objective, parts = trainer.objective, []
    for one in trainer.objective.rollout._backbones.values():
        one.transformer.double()
    objective.reward_models.decode.vae.double()
    objective.reward_models = RewardModels({"plain": PlainReward()}, {"plain": 1.0}, objective.reward_models.decode)
    for indices in ([0, 1], [0], [1]):
        batch = trainer.data.load_batch(indices)
        keys = [(1, "low", 7 + i, own) for i, own in zip(indices, batch.ids, strict=True)]
        draws = make_draws(batch, keys, trainer.data.streams[LOW].sigma_rule)
        wide = Draws(draws.sigma_B, draws.noise_BCTHW.double(), draws.dropped_B, draws.weight_B, draws.keys)
        [batch] = trainer.objective.prepare(LOW, [batch], draws=[wide])
        for parameter in trainer.parameters.values():
            parameter.grad = None
        with objective.loss(LOW, batch, wide) as loss:
            loss.total_B.sum().backward()
        parts.append((batch.latents_BCTHW, loss.total_B.detach(),
                      {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}))
    both, *alone = parts
    torch.testing.assert_close(both[0], torch.cat([one[0] for one in alone]), rtol=0, atol=1e-10)
    torch.testing.assert_close(both[1], torch.cat([one[1] for one in alone]), rtol=0, atol=1e-10)
    for name, gradient in both[2].items():
        torch.testing.assert_close(gradient, alone[0][2][name] + alone[1][2][name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_rollout_is_the_generators_euler(guidance, tiny_t2v: ModelSpec):
    from lapwan.sampling.generator import Generator
    from lapwan.sampling.request import Request
    from lapwan.wan.text import pad_text

    generator = Generator(tiny_t2v)
    strength = dict.fromkeys(NoiseExpert, guidance)
    want = generator.latents(Request("电凝钩切割组织", 5, (32, 48), 4, strength, 16, sampler="euler", seed=9))
    negative = generator.text_features(Request("", 1, (32, 32), 1, {}, 16).negative_prompt)
    backbones = {e: generator.noise_experts.backbone(e) for e in NoiseExpert}
    visited: list[NoiseExpert] = []
    rollout = Rollout(tiny_t2v, RolloutRule(4, guidance), backbones, visited.append, negative)
    shape = tiny_t2v.latent_shape(5, 32, 48)
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(9))
    conditions = rollout.conditions([generator.text_features("电凝钩切割组织")])
    assert conditions.text_BLD.shape == pad_text([generator.text_features("电凝钩切割组织")]).shape
    found = rollout.sample([noise, noise.clone()], [conditions, conditions])
    assert visited == [NoiseExpert.HIGH, NoiseExpert.LOW], "one fetch of each noise expert, however many batches"
    torch.testing.assert_close(found[0], want, rtol=0, atol=2e-5)
    assert torch.equal(found[0], found[1])
