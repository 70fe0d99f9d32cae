"""A run made to collapse is caught by the warnings, and the advice they give mends it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from training_cases import edited_cache

from lapwan.errors import UserError
from lapwan.train.checkpoint import checkpoints

# No teacher, no balance, no entropy term; one expert acts, so the one that acts is the one that learns.
COLLAPSING = {
    "targets": {"last_blocks": 1, "ffn_last_blocks": 1}, "steps": 30, "turn": 1, "batch_size": 2,
    "optimizer": {"lr": 3e-3}, "router": {"top_k": 1, "lr_scale": 1.0}, "save_every": 1000,
    "routing_loss": {"teacher_kl": 0.0, "balance": 0.0, "entropy": 0.0},
    "routing_watch": {"every": 20, "after": 40},
}


@pytest.fixture(scope="session")
def skewed_cache(tmp_path_factory, t2v_cache):
    """Nine clips of scissors to one of each other family."""
    def edit(items):
        own = [replace(item, fallback=False) for item in items]
        return [*(replace(own[0], id=f"clip0-{i}") for i in range(9)), *own[1:]]
    return edited_cache(t2v_cache, tmp_path_factory.mktemp("caches") / "skewed", edit)


def advised(settings: dict, changes: dict[str, float]) -> dict:
    """The settings with the advice followed."""
    made = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        made[section][name] = value
    return made


def test_a_collapse_is_told_and_the_advice_mends_it(make_moe, skewed_cache, tmp_path, capsys):
    settings = {**COLLAPSING, "data": {"cache": skewed_cache}}
    sick = make_moe(**settings)
    sick.config.run_folder.mkdir()
    sick.fit()
    faults = sick.callbacks["routing"].faults
    said = " ".join(capsys.readouterr().err.split())
    assert "overuse" in {fault.kind for fault in faults}
    assert "of the gates, above 70%" in said and "check the label file" in said
    changes = {key: value for fault in faults for key, value in fault.change.items()}
    assert changes["data.balance"] == 1.0 and changes["routing_loss.balance"] == 0.2
    assert changes["routing_loss.teacher_kl"] == 2.0
    mended = make_moe(**advised(settings, changes), output=tmp_path / "mended")
    mended.config.run_folder.mkdir()
    mended.fit()
    assert mended.callbacks["routing"].faults == [], [str(f) for f in mended.callbacks["routing"].faults]
    assert "of the gates" not in capsys.readouterr().err


def test_a_collapsed_run_stops_where_that_is_wanted(make_moe, skewed_cache):
    stopping = {"health": {"on_unhealthy": "stop", "patience": 2}}
    trainer = make_moe(**{**COLLAPSING, **stopping, "data": {"cache": skewed_cache}})
    trainer.config.run_folder.mkdir()
    with pytest.raises(UserError, match=r"2 windows in a row: .* has collapsed; .*saved at step 60 of 60"):
        trainer.fit()
    assert checkpoints(trainer.config.run_folder)[-1][0] == 60
