"""Alpha in phases: what decides, ΔW continuous at a transition, the optimizer's history in new units, resume."""

from __future__ import annotations

import json

import pytest
import torch
from training_cases import randomise

from lapwan.lora.formats import open_lora
from lapwan.names import NoiseExpert
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.train.callbacks.alpha_schedule import Observation, plain_slope, trend
from lapwan.train.callbacks.base import Callback

HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW


def phases(*alphas: float, **more) -> dict:
    return {"phases": [{"name": f"p{i}", "alpha": alpha, **more} for i, alpha in enumerate(alphas)]}


def noisy(slope: float, count: int, cv: float, seed: int = 0) -> list[Observation]:
    """Losses of two sigma bins, one thirty times the other, falling by `slope` a step from 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, generator=generator).tolist()
    bins = (torch.rand(count, generator=generator) < 0.5).tolist()
    return [Observation(t, int(b), (30.0 if b else 1.0) * (1 - slope * t) * (1 + cv * n))
            for t, (b, n) in enumerate(zip(bins, noise, strict=True))]


def test_the_trend_is_found_through_sigma_bins_of_very_different_size():
    found = trend(noisy(4e-4, 1000, 0.2), 0.95)
    # relative to the mean of the window, 1 − 4e-4·500 = 0.8: 5 % per 100 steps
    assert found.decrease == pytest.approx(0.05, abs=0.006) and found.upper > found.decrease
    raw = [one.loss for one in noisy(4e-4, 1000, 0.2)]
    assert plain_slope(raw)[1] < 0.05  # the same line through raw losses explains next to nothing


def test_the_bound_covers_the_truth_as_often_as_it_says():
    covered = sum(trend(noisy(2e-4, 300, 0.3, seed), 0.95).upper > 0.02 / 0.97 for seed in range(200))
    assert 180 <= covered <= 199


def test_two_hundred_losses_cannot_show_that_a_loss_is_flat_and_a_thousand_can():
    """The bound's width is 164.5·cv / √(n³ / 12): 8.1 % a 100 steps for 200 losses of scatter 0.4, 0.7 % for 1000."""
    for count, width in ((200, 0.081), (1000, 0.0072)):
        found = trend(noisy(0.0, count, 0.4, 1), 0.95)
        assert found.upper - found.decrease == pytest.approx(width, rel=0.12)
    assert trend(noisy(0.0, 10, 0.4), 0.95) is None


@pytest.mark.parametrize("optimizer", [{"type": "adamw", "lr": 1e-3}, {"type": "automagic", "max_lr": 1e-3}])
def test_delta_w_is_continuous_at_a_transition_and_the_other_noise_expert_is_not_touched(make_lora, optimizer):
    trainer = make_lora(steps=3, optimizer=optimizer, ema_decay=0.5,
                        high={"alpha_schedule": phases(8.0, 20.0, max_steps=2)})
    randomise(trainer)
    rule = trainer.callbacks["alpha.high"]
    ups = {n: p for n, p in trainer.parameters.items() if n.startswith("high.") and n.endswith(".up")}
    transitions = []

    class Before(Callback):
        """Keeps what a transition must not change, after the optimizer's step."""

        name = "before"

        def after_update(self, result):
            self.alpha = rule.alpha
            self.entries = {e: trainer.objective.adapters[e].state("lora").entries for e in (HIGH, LOW)}
            states = trainer.optimizers["high"].optimizer.state
            self.states = {n: {k: v.clone() for k, v in states[p].items() if isinstance(v, torch.Tensor)}
                           for n, p in ups.items()}
            self.means = {n: trainer.ema.means[n].clone() for n in ups}
            return {}

    class After(Callback):
        name = "after"

        def after_update(self, result):
            if rule.alpha == before.alpha:
                return {}
            transitions.append(result.step)
            high, low = (trainer.objective.adapters[e].state("lora").entries for e in (HIGH, LOW))
            for path, entry in high.items():
                assert entry.alpha == 20.0
                was = before.entries[HIGH][path].delta(torch.float64)  # equal up to the rounding of B to fp32
                torch.testing.assert_close(
                    entry.delta(torch.float64), was, rtol=0, atol=1e-6 * float(was.abs().max()))
            for path, entry in low.items():
                assert torch.equal(entry.up, before.entries[LOW][path].up)
            for name, parameter in ups.items():
                now, was = trainer.optimizers["high"].optimizer.state[parameter], before.states[name]
                for key, power in (("exp_avg", 1), ("exp_avg_sq", 2), ("row", 2), ("column", 2), ("lr", 0)):
                    if key in was:
                        torch.testing.assert_close(now[key], was[key] * 2.5**power)
                torch.testing.assert_close(trainer.ema.means[name], before.means[name] / 2.5)
            return {}

    before, after = Before(), After()
    trainer.callbacks = {"before": before, **trainer.callbacks, "after": after}
    trainer.config.run_folder.mkdir()
    trainer.fit()
    assert len(transitions) == 1 and rule.alpha == 20.0
    assert all(e.alpha != 20.0 for e in trainer.objective.adapters[LOW].state("lora").entries.values())
    [(_, file)] = open_lora(trainer.config.run_folder / "lapwan_high_noise.safetensors").items()
    assert {entry.alpha for entry in file.read().entries.values()} == {20.0}


def test_a_flat_loss_ends_the_phase_and_the_log_says_the_numbers(make_lora, capsys):
    trainer = make_lora(noise_experts=["high"], steps=40, alpha_schedule={
        **phases(4.0, 8.0, min_steps=22, min_gradient_stability=0.47, loss_improvement_rate_below=0.005),
        "decrease_below": 10.0, "confirmations": 2, "check_every": 5, "window": 100})
    trainer.config.run_folder.mkdir()
    trainer.fit()
    rows = [json.loads(line) for line in (trainer.config.run_folder / "metrics.jsonl").read_text().splitlines()]
    values = [row["alpha/value"] for row in rows]
    # 20 losses are the fewest that say anything; the second check in a row, and past min_steps, is at 25
    assert values == [4.0] * 24 + [8.0] * 16
    assert rows[24]["alpha/decrease_bound"] < 10.0
    said = capsys.readouterr().err
    assert "alpha 4 -> 8 (p0 -> p1) at its step 25: flat 2 times in a row (bound below 1000 %)" in said
    assert "upper bound" in said and "advisory: loss improvement rate" in said and "gradient stability" in said


def test_a_phase_that_still_falls_goes_on_until_max_steps(make_lora):
    trainer = make_lora(noise_experts=["high"], steps=30, alpha_schedule={
        **phases(4.0, 8.0, max_steps=27), "decrease_below": 1e-9, "check_every": 5})
    trainer.config.run_folder.mkdir()
    trainer.fit()
    rows = [json.loads(line) for line in (trainer.config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["alpha/value"] for row in rows] == [4.0] * 26 + [8.0] * 4


def test_resume_after_a_transition_is_bitwise(make_lora, make_moe, tmp_path):
    common = {"steps": 6, "alpha_schedule": phases(4.0, 8.0, 2.0, max_steps=2), "optimizer": {"lr": 1e-2}}
    for kind, make in (("lora", make_lora), ("moe", make_moe)):
        whole = make(output=tmp_path / f"{kind}whole", **common)
        whole.config.run_folder.mkdir()
        whole.fit()
        part = make(output=tmp_path / f"{kind}part", **common)
        part.config.run_folder.mkdir()
        part.schedule = part.schedule[:5]
        part.fit()
        again = make(output=tmp_path / f"{kind}part", **common)
        assert again.resume() and again.callbacks["alpha.high"].alpha == 8.0
        again.fit()
        assert all(torch.equal(p, again.parameters[n]) for n, p in whole.parameters.items())
        assert again.callbacks["alpha.low"].alpha == 2.0


@pytest.mark.parametrize(("changes", "message"), [
    ({"alpha": 8.0, "alpha_schedule": phases(1.0)}, "alpha = 8 and alpha_schedule both set alpha"),
    ({"optimizer": {"type": "prodigy"}, "alpha_schedule": phases(1.0)}, "use adamw or automagic"),
    ({"low": {"alpha_schedule": phases(1.0, min_steps=5, max_steps=3)}}, "max_steps = 3 is below min_steps = 5"),
    ({"init_lora": {"high": "x.safetensors"}, "alpha_schedule": phases(1.0)}, "has its own alpha"),
])
def test_what_cannot_work_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainLoraSettings.model_validate({"output": "run", "data": {"cache": "cache"}, "steps": 1, **changes})
