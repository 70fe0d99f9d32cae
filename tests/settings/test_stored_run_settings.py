"""A run's settings.toml against today's settings: a run older than a key resumes, a changed value is named."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from lapwan.errors import UserError
from lapwan.settings.load import load
from lapwan.settings.srpo import SrpoSettings
from lapwan.settings.train import TrainSettings
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.train.run_folder import claim_run, start_folder

AUTOMAGIC = {"optimizer.type": "automagic"}
MODELS: dict[str, tuple[type[TrainSettings | SrpoSettings], dict[str, Any]]] = {
    "train-lora": (TrainLoraSettings, {"data.cache": "cache", "steps": 3}),
    "train-moe": (TrainMoeSettings, {"data.cache": "cache", "steps": 3}),
    "srpo": (SrpoSettings, {"prompts.file": "p.txt", "rewards": "tiny"}),
}
Make = Callable[..., TrainSettings | SrpoSettings]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def settings(command: str, **options: Any) -> TrainSettings | SrpoSettings:
        model, required = MODELS[command]
        return load(model, options={**required, "output": tmp_path / "run", **options}, environment={})

    return settings


def store(settings: TrainSettings | SrpoSettings, *without: str) -> None:
    """Start the run's folder; then remove keys from its settings.toml, as if they had not existed yet."""
    start_folder(settings, overwrite=False)
    path = settings.output / "settings.toml"
    tree = tomllib.loads(path.read_text(encoding="utf-8"))
    for key in without:
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        del node[leaf]
    path.write_text(tomli_w.dumps(tree), encoding="utf-8")


@pytest.mark.parametrize(("command", "key", "options"), [
    ("train-lora", "compile", {}),  # this one and the next may differ on resume anyway
    ("train-lora", "sigma_bins", {}),
    ("train-lora", "max_grad_norm", {}),
    ("train-lora", "noise_experts", {}),
    ("train-lora", "optimizer.lora_plus", {}),
    ("train-lora", "optimizer.clip_threshold", AUTOMAGIC),
    ("train-lora", "alpha_schedule", {}),
    ("train-lora", "targets.ffn_out", {"targets.q": 16}),
    ("train-moe", "routing_loss.teacher_temperature", {}),
    ("train-moe", "router", {}),
    ("srpo", "accumulate", {}),
    ("srpo", "targets", {}),  # its default differs from that of TargetSettings
    ("srpo", "optimizer.weight_decay", {}),
])
def test_a_run_older_than_a_key_resumes(make: Make, command: str, key: str, options: dict[str, Any]) -> None:
    store(make(command, **options), key)
    claim_run(make(command, resume=True, **options), overwrite=False)


@pytest.mark.parametrize(("command", "key", "change", "message"), [
    ("train-lora", "max_grad_norm", {"max_grad_norm": 2.0}, "max_grad_norm: None -> 2.0"),
    ("train-lora", "optimizer.lora_plus", {"optimizer.lora_plus": 4.0}, "optimizer.lora_plus: None -> 4.0"),
    ("train-lora", "seed", {"seed": 43, "max_grad_norm": 2.0}, "max_grad_norm: 1.0 -> 2.0; seed: None -> 43"),
    ("train-lora", None, {"ema_decay": 0.9}, "ema_decay: None -> 0.9"),
    ("train-lora", None, AUTOMAGIC, "optimizer.type: 'adamw' -> 'automagic'"),
    ("train-moe", "router", {"router.top_k": 1}, "router.top_k: None -> 1"),
    ("srpo", "targets", {"targets.q": 8}, "targets.q: None -> 8"),
])
def test_a_changed_value_is_named(make: Make, command: str, key: str | None, change: dict[str, Any],
                                  message: str) -> None:
    store(make(command), *[key] * (key is not None))
    with pytest.raises(UserError, match="cannot resume") as caught:
        claim_run(make(command, resume=True, **change), overwrite=False)
    assert message in str(caught.value)
    claim_run(make(command, resume=True, allow_changed=True, **change), overwrite=False)


def test_a_value_set_back_to_its_default_is_named(make: Make) -> None:
    store(make("train-lora", max_grad_norm=2.0))
    with pytest.raises(UserError, match=r"max_grad_norm: 2\.0 -> 1\.0"):
        claim_run(make("train-lora", resume=True), overwrite=False)
