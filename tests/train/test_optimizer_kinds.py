"""Optimizers: Automagic against its restatement, users' flat keys, predictions, LoRA+, extras."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from lapwan.errors import UserError
from lapwan.names import NoiseExpert
from lapwan.settings.optimizers import AdamW8bitSettings, AutomagicSettings, ScheduleSettings
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.train import optimizers
from lapwan.train.automagic import Automagic
from lapwan.train.objective import ParameterGroup

HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW
BASE = {"output": "run", "data": {"cache": "cache"}, "steps": 1}
USERS = {"high_noise_lr_bump": 2e-5, "high_noise_min_lr": 2e-5, "high_noise_max_lr": 5e-4, "low_noise_lr_bump": 5e-6,
         "low_noise_min_lr": 5e-6, "low_noise_max_lr": 1e-4, "beta2": 0.999, "weight_decay": 1e-4,
         "clip_threshold": 1.0}


def reference(weight, grads, s: AutomagicSettings):
    """The restatement, element by element, in Python floats."""
    rows, columns = weight.shape
    w = weight.tolist()
    r, c = [0.0] * rows, [0.0] * columns
    lr = [[s.min_lr if s.lr is None else s.lr] * columns for _ in range(rows)]
    last = None
    for grad in grads:
        g = grad.tolist()
        g2 = [[x * x + s.eps for x in row] for row in g]
        r = [s.beta2 * r[i] + (1 - s.beta2) * sum(g2[i]) / columns for i in range(rows)]
        c = [s.beta2 * c[j] + (1 - s.beta2) * sum(g2[i][j] for i in range(rows)) / rows for j in range(columns)]
        mean = sum(r) / rows
        u = [[g[i][j] / (r[i] * c[j] / mean) ** 0.5 for j in range(columns)] for i in range(rows)]
        rms = (sum(x * x for row in u for x in row) / (rows * columns)) ** 0.5
        u = [[x / max(1.0, rms / s.clip_threshold) for x in row] for row in u]
        for i in range(rows):
            for j in range(columns):
                if last is not None:
                    agrees = (u[i][j] > 0) == (last[i][j] > 0)
                    lr[i][j] = min(s.max_lr, max(s.min_lr, lr[i][j] + (s.lr_bump if agrees else -s.lr_bump)))
                w[i][j] -= lr[i][j] * (s.weight_decay * w[i][j] + u[i][j])
        last = u
    return torch.tensor(w, dtype=torch.float64), torch.tensor(lr, dtype=torch.float64)


def test_automagic_equals_a_plain_reference_in_fp64():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 7, generator=generator, dtype=torch.float64))
    trend = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    grads = [trend * (n < 20) + torch.randn(5, 7, generator=generator, dtype=torch.float64) for n in range(40)]
    settings = AutomagicSettings(lr=3e-3, lr_bump=1e-3, min_lr=1e-3, max_lr=2e-2, weight_decay=0.1, clip_threshold=0.7)
    expected, rates = reference(weight.detach(), grads, settings)
    # Others of the same shape, which go through the same kernels, and of another one, have no part in it.
    beside = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
              for shape in ((5, 7), (5, 7), (7, 5))]
    optimizer = Automagic([{"params": [beside[0], weight, *beside[1:]]}], settings)
    for grad in grads:
        weight.grad = grad
        for other in beside:
            other.grad = torch.randn(other.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(optimizer.state[weight]["lr"], rates, rtol=0, atol=1e-15)
    assert float(rates.min()) == 1e-3 < 2e-3 < float(rates.max())
    every = torch.cat([optimizer.state[p]["lr"].flatten() for p in (weight, *beside)])
    assert float(optimizer.mean_lr()) == pytest.approx(float(every.mean()))


def test_the_lr_mask_is_fp32_under_bf16_weights_and_small_bumps_count():
    """Half an ulp of bf16 at 5e-4 is 9.5e-7: a bump of 5e-7 would vanish in it."""
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = Automagic([{"params": [weight]}], AutomagicSettings(lr=5e-4, lr_bump=5e-7, min_lr=1e-6, max_lr=1e-3))
    for _ in range(11):
        weight.grad = torch.ones(4, 4, dtype=torch.bfloat16)
        optimizer.step()
    mask = optimizer.state[weight]["lr"]
    assert mask.dtype == torch.float32
    torch.testing.assert_close(mask, torch.full((4, 4), 5e-4 + 10 * 5e-7), rtol=1e-5, atol=0)


def test_vectors_are_not_factored():
    gate = torch.nn.Parameter(torch.zeros(3))
    optimizer = Automagic([{"params": [gate]}], AutomagicSettings())
    gate.grad = torch.tensor([1.0, -2.0, 4.0])
    optimizer.step()
    assert set(optimizer.state[gate]) == {"lr", "square", "positive"}
    assert bool(gate[0] < 0 < gate[1]) and bool(gate[0] == -gate[1])  # u = g / √v̂ is the sign alone at first


def test_predicted_ratios_of_the_users_block_and_a_simulated_walk():
    settings = TrainLoraSettings.model_validate({**BASE, **USERS})
    high, low = (settings.of(e, 1).optimizer for e in (HIGH, LOW))
    assert (high.type, high.lr_bump, high.min_lr, high.max_lr) == ("automagic", 2e-5, 2e-5, 5e-4)
    assert (low.lr_bump, low.min_lr, low.max_lr, low.weight_decay) == (5e-6, 5e-6, 1e-4, 1e-4)
    ratios = [high.predicted_lr(p) / low.predicted_lr(p) for p in (0.47, 0.50, 0.53)]
    assert [round(ratio, 2) for ratio in ratios] == [4.40, 4.95, 5.22]
    assert "4.40 at sign agreement 0.47, 4.95 at sign agreement 0.50, 5.22 at" in optimizers.ratio_line(high, low)
    assert high.predicted_lr(0.53) / high.max_lr == pytest.approx(0.74, abs=0.005)
    assert high.predicted_lr(0.486) == pytest.approx(2.0e-4, rel=0.03)
    up = torch.rand(3000, 4000, generator=torch.Generator().manual_seed(1)) < 0.53
    rung = torch.zeros(4000)
    seen = torch.zeros(())
    for step, going_up in enumerate(up):
        rung = (rung + torch.where(going_up, 1.0, -1.0)).clamp(0, 24)
        seen += rung.mean() * (step >= 1500)
    simulated = 2e-5 + float(seen) / 1500 * 2e-5
    assert simulated == pytest.approx(high.predicted_lr(0.53), rel=0.01)


def test_flat_keys_inside_the_optimizer_section_and_clashes():
    settings = TrainLoraSettings.model_validate({**BASE, "optimizer": {"type": "automagic", "low_noise_max_lr": 2e-4}})
    assert settings.of(LOW, 1).optimizer.max_lr == 2e-4 and settings.of(HIGH, 1).optimizer.max_lr == 1e-4
    with pytest.raises(ValueError, match=r"high.optimizer.*min_lr = 0.001 is above max_lr = 0.0005"):
        TrainLoraSettings.model_validate({**BASE, "high_noise_min_lr": 1e-3, "high_noise_max_lr": 5e-4})


def test_another_type_for_one_noise_expert_starts_from_its_own_defaults():
    settings = TrainLoraSettings.model_validate(
        {**BASE, "optimizer": {"lr": 3e-4}, "high": {"optimizer": {"type": "automagic", "max_lr": 3e-4}}})
    assert settings.of(HIGH, 1).optimizer == AutomagicSettings(max_lr=3e-4)
    assert settings.of(LOW, 1).optimizer.lr == 3e-4


def test_lora_plus_gives_b_its_own_lr(make_lora):
    trainer = make_lora(optimizer={"lr": 1e-4, "lora_plus": 16.0})
    groups = trainer.optimizers["high"].optimizer.param_groups
    ups = {id(p) for n, p in trainer.parameters.items() if n.endswith(".up")}
    for group in groups:
        assert group["lr"] == pytest.approx(16e-4 if {id(p) for p in group["params"]} <= ups else 1e-4)
    assert sum(len(group["params"]) for group in groups) == sum(n.startswith("high") for n in trainer.parameters)


def test_missing_extras_and_schedules_without_effect_are_refused_before_weights_are_loaded(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for kind, library in (("prodigy", "prodigyopt"), ("adamw8bit", "bitsandbytes")):
        own = TrainLoraSettings.model_validate({**BASE, "optimizer": {"type": kind}}).of(HIGH, 1)
        with pytest.raises(UserError, match=rf"needs {library}, which is not installed; pip .*lapwan\[{kind}\]"):
            optimizers.check_optimizer(own.optimizer, own.schedule)
    with pytest.raises(UserError, match="has no effect on automagic"):
        optimizers.check_optimizer(AutomagicSettings(), ScheduleSettings(name="cosine"))


def test_allowed_changes_reach_a_resumed_optimizer_and_its_history_stays(make_lora, tmp_path):
    bounds = {"type": "automagic", "lr_bump": 1e-3, "min_lr": 1e-3, "max_lr": 1e-2}
    first = make_lora(output=tmp_path / "run", optimizer=bounds)
    first.config.run_folder.mkdir()
    first.fit()
    again = make_lora(output=tmp_path / "run", optimizer={**bounds, "max_lr": 3e-2, "weight_decay": 0.5},
                      allow_changed=True)
    assert again.resume()
    optimizer = again.optimizers["high"].optimizer
    assert (optimizer.param_groups[0]["max_lr"], optimizer.param_groups[0]["weight_decay"]) == (3e-2, 0.5)
    state, was = (next(iter(o.state.values())) for o in (optimizer, first.optimizers["high"].optimizer))
    assert torch.equal(state["lr"], was["lr"]) and state["positive"].dtype == torch.bool
    other = make_lora(output=tmp_path / "run", optimizer={"type": "adamw"}, allow_changed=True)
    assert other.resume() and not other.optimizers["high"].optimizer.state  # another kind starts without a history


def test_8_bit_adamw_needs_a_gpu():
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(UserError, match=r"optimizer.type = 'adamw8bit' needs a GPU; set optimizer.type = 'adamw'"):
        optimizers.make_optimizer(AdamW8bitSettings(), [ParameterGroup({"w": weight})])


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed here")
def test_8_bit_adamw_without_its_library_is_one_line_for_the_user(lapwan, t2v_cache, tmp_path):
    ran = lapwan("train-lora", "--model", "tiny", "--cache", t2v_cache, "-o", tmp_path / "run", "--steps", "1",
                 "--set", "optimizer.type=adamw8bit")
    assert ran.code == 2 and not (tmp_path / "run").exists()
    *_, line = ran.err.strip().splitlines()
    assert line == ("error: optimizer.type = 'adamw8bit' needs bitsandbytes, which is not installed; pip install "
                    "'lapwan[adamw8bit]', or set optimizer.type = 'adamw'")
