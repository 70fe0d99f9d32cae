"""Every optimizer, lr schedule, sigma sampler and weighting goes on after a restart as if there had been none."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
import torch

from lapwan.settings.optimizers import OPTIMIZERS, ScheduleSettings
from lapwan.settings.sigma import SigmaSettings, WeightingSettings

AUTOMAGIC = {"type": "automagic", "lr_bump": 1e-3, "min_lr": 1e-3, "max_lr": 1e-2}
ROWS: dict[str, dict[str, Any]] = {
    "adamw, polynomial, uniform": {
        "optimizer": {"lr": 1e-2}, "schedule": {"name": "polynomial", "warmup_steps": 1, "power": 2.0}},
    "adamw LoRA+, linear, logit-normal truncated": {
        "optimizer": {"lr": 1e-2, "lora_plus": 4.0}, "schedule": {"name": "linear", "warmup_steps": 2},
        "sigma": {"sampler": "logit_normal", "mean": -0.5, "std": 1.2, "shift": 3.0, "strata": 4},
        "weighting": {"kind": "min_snr", "gamma": 2.0}},
    "adamw, cosine, sigmoid squeezed": {
        "optimizer": {"lr": 1e-2}, "schedule": {"name": "cosine", "warmup_steps": 1},
        "sigma": {"sampler": "sigmoid", "scale": 1.5, "shift": "resolution", "band": "squeeze"},
        "weighting": {"kind": "cosmap"}},
    "adamw, constant, uniform squeezed": {
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1}, "schedule": {"name": "constant"},
        "sigma": {"band": "squeeze", "strata": 8}},
    "adamw, warm-up, logit-normal squeezed": {
        "optimizer": {"lr": 1e-2}, "schedule": {"name": "constant_with_warmup", "warmup_steps": 3},
        "sigma": {"sampler": "logit_normal", "band": "squeeze", "shift": 5.0}, "weighting": {"kind": "x0"}},
    "automagic, sigmoid truncated": {
        "optimizer": {**AUTOMAGIC, "lora_plus": 2.0}, "sigma": {"sampler": "sigmoid", "strata": 3}},
    "prodigy, cosine with restarts": {
        "optimizer": {"type": "prodigy", "weight_decay": 0.01},
        "schedule": {"name": "cosine_with_restarts", "cycles": 2}, "sigma": {"shift": 2.0}},
}


def test_the_rows_cover_what_there_is():
    def seen(section: str, key: str, default: object) -> set[object]:
        return {row.get(section, {}).get(key, default) for row in ROWS.values()}

    def names(model: Any, field: str) -> set[str]:
        return set(get_args(model.model_fields[field].annotation))

    kinds = {kind.model_fields["type"].default for kind in OPTIMIZERS}
    assert seen("optimizer", "type", "adamw") == kinds - {"adamw8bit"}  # which needs a GPU: tests/gpu
    assert seen("schedule", "name", "constant_with_warmup") == names(ScheduleSettings, "name")
    assert seen("sigma", "sampler", "uniform") == names(SigmaSettings, "sampler")
    assert seen("sigma", "band", "truncate") == names(SigmaSettings, "band")
    assert seen("weighting", "kind", "none") == names(WeightingSettings, "kind")
    assert {1.0, "resolution"} < seen("sigma", "shift", 1.0) and {1} < seen("sigma", "strata", 1)


@pytest.mark.parametrize("row", ROWS)
def test_resume_is_bitwise(make_lora, tmp_path, row):
    if ROWS[row]["optimizer"].get("type") == "prodigy":
        pytest.importorskip("prodigyopt")
    common = {"steps": 3, "ema_decay": 0.9, "max_norm": 0.05, "caption_dropout": 0.3,
              "dropout": {"rank": 0.2, "neuron": 0.1, "module": 0.1}, **ROWS[row]}
    whole, part = (make_lora(output=tmp_path / name, **common) for name in ("whole", "part"))
    part.schedule = part.schedule[:4]
    for trainer in (whole, part):
        trainer.config.run_folder.mkdir()
        trainer.fit()
    again = make_lora(output=tmp_path / "part", **common)
    assert again.resume() and again.step == 4
    again.fit()
    assert all(torch.equal(p, again.parameters[n]) for n, p in whole.parameters.items())
    assert all(torch.equal(m, again.ema.means[n]) for n, m in whole.ema.means.items())
    for name, optimizer in whole.optimizers.items():
        _same(optimizer.optimizer.state_dict(), again.optimizers[name].optimizer.state_dict())
        _same(_plain(optimizer.lr_schedule), _plain(again.optimizers[name].lr_schedule))
    ours, theirs = ([json.loads(line) for line in (t.config.run_folder / "metrics.jsonl").read_text().splitlines()]
                    for t in (whole, again))
    for one, other in zip(ours, theirs, strict=True):  # lr by schedule, loss by sigma, noise, dropout and order
        assert [one[k] for k in ("lr", "loss", "grad_norm")] == [other[k] for k in ("lr", "loss", "grad_norm")]
    assert max(float(p.detach().abs().max()) for n, p in whole.parameters.items() if n.endswith(".up")) > 0


def _plain(schedule: Any) -> dict[str, Any]:
    return {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"}


def _same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            _same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other) and one.dtype == other.dtype
    else:
        assert one == other
