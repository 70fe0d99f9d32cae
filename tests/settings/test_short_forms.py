"""Keys without their section, the names other trainers have, and what is laid over shared targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lapwan.errors import UserError
from lapwan.names import NoiseExpert
from lapwan.settings.aliases import OTHER_TRAINERS, accepted_keys
from lapwan.settings.base import to_toml
from lapwan.settings.load import load
from lapwan.settings.srpo import SrpoSettings
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.settings.train_moe import TrainMoeSettings

HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW
GOOD = 'output = "run"\nsteps = 10\ndata.cache = "cache"\n'


def settings(tmp_path: Path, text: str, *sets: str, **options: Any) -> TrainLoraSettings:
    path = tmp_path / "stage1.toml"
    path.write_text(GOOD + text, encoding="utf-8")
    return load(TrainLoraSettings, path, sets, {k.replace("__", "."): v for k, v in options.items()}, {})


def ranks(own: Any) -> tuple[int, ...]:
    return own.targets.q, own.targets.o, own.targets.ffn_in, own.targets.ffn_out


def test_lr_and_rank_stand_without_their_section(tmp_path):
    said = settings(tmp_path, "lr = 2e-4\nrank = 16\n[high]\nlr = 5e-4\nrank = 8\n")
    assert (said.of(HIGH, 1).optimizer.lr, said.of(LOW, 1).optimizer.lr) == (5e-4, 2e-4)
    assert (ranks(said.of(HIGH, 1)), ranks(said.of(LOW, 1))) == ((8, 8, 8, 0), (16, 16, 16, 0))
    again = tmp_path / "settings.toml"
    again.write_text(to_toml(said), encoding="utf-8")
    assert load(TrainLoraSettings, again, environment={}).of(HIGH, 1) == said.of(HIGH, 1)


def test_a_recipe_keeps_its_modules_under_another_rank(tmp_path):
    said = settings(tmp_path, 'targets = "last_2"\nrank = 16\nhigh.rank = 8\n')
    assert (ranks(said.of(HIGH, 1)), ranks(said.of(LOW, 1))) == ((8, 8, 8, 8), (16, 16, 16, 16))
    assert said.of(HIGH, 1).targets.last_blocks == 2


def test_a_stronger_source_replaces_the_other_spelling(tmp_path):
    assert settings(tmp_path, "lr = 2e-4\n", optimizer__lr="3e-4").optimizer.lr == 3e-4
    assert settings(tmp_path, "optimizer.lr = 2e-4\n", "lr=3e-4").optimizer.lr == 3e-4
    assert settings(tmp_path, "high.lr = 2e-4\n", "high.optimizer.lr=3e-4").of(HIGH, 1).optimizer.lr == 3e-4
    aligned = load(SrpoSettings, None, ["lr=3e-6", "prompts.file=p.txt", "output=o", "rewards=tiny"], environment={})
    assert aligned.optimizer.lr == 3e-6


@pytest.mark.parametrize(("text", "message"), [
    ("lr = 1e-4\noptimizer.lr = 2e-4\n", "lr = 0.0001 and optimizer.lr = 0.0002 say the same thing; leave one out"),
    ("low.rank = 4\nlow.targets.rank = 8\n", "[low] rank = 4 and targets.rank = 8 say the same thing"),
    ("lr = -1\n", "stage1.toml, line 4: optimizer.lr = -1: must be greater than 0"),
    ("network_dim = 16\n", "stage1.toml, line 4: unknown key 'network_dim' (here it is 'rank')"),
    ("high.learning_rate = 1e-4\n", "unknown key 'high.learning_rate' (here it is 'lr')"),
    ('targets = {q = 32, patterns = {"blocks.*" = 4}}\n', "so q = 32 has no effect"),
    ('targets.patterns = {"blocks.*" = 4}\nhigh.rank = 16\n', "high.targets: patterns have their own ranks"),
])
def test_what_would_do_nothing_is_refused(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        settings(tmp_path, text)
    assert message in str(caught.value)


def test_patterns_of_its_own_stand_instead_of_what_is_shared(tmp_path):
    said = settings(tmp_path, 'rank = 16\nhigh.targets.patterns = {"blocks.*" = 2}\n')
    assert said.of(HIGH, 1).targets.patterns == {"blocks.*": 2} and not said.of(LOW, 1).targets.patterns
    families = {"hook": {"patterns": {"blocks.0.*": 3}}}
    mixture = TrainMoeSettings.model_validate({"output": "o", "steps": 1, "data": {"cache": "c"}, "targets": {"q": 32},
                                               "expert_targets": families})
    assert mixture.targets_for("hook", mixture.targets).patterns == {"blocks.0.*": 3}
    with pytest.raises(ValueError, match=r"expert_targets\.hook: .*q = 9 has no effect"):
        TrainMoeSettings.model_validate({**mixture.model_dump(), "targets": {"patterns": {"blocks.*": 2}},
                                         "expert_targets": {"hook": {"q": 9}}})


def test_every_name_of_another_trainer_leads_to_one_of_ours():
    assert set(OTHER_TRAINERS.values()) <= set(accepted_keys(TrainLoraSettings.model_fields))
    assert not set(OTHER_TRAINERS) & set(accepted_keys(TrainLoraSettings.model_fields))
