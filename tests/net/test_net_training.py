"""Twenty steps of each training command have the losses of 2026-11, and runs that stopped then go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run_lapwan, run_successfully
from net_cases import ARTEFACTS, RUNS, STOPPED, assert_figures, figures_of_steps, read_json

LOSSES = read_json(ARTEFACTS / "expected" / "losses.json")
RTOL = 1e-4  # between machines; record anew only with a change that means to change the losses


@pytest.mark.parametrize("name", RUNS)
def test_the_losses_of_twenty_steps_are_the_stored_ones(net: Path, name: str) -> None:
    assert len(LOSSES[name]["loss"]) == 20
    run_successfully(*RUNS[name], "-o", "now")
    assert_figures(LOSSES[name], figures_of_steps(net / "now"), RTOL, atol=1e-6)


@pytest.mark.parametrize("name", STOPPED)
def test_an_interrupted_run_goes_on_with_the_losses_of_one_that_was_not(net: Path, name: str) -> None:
    run = net / "runs" / name
    done = len(figures_of_steps(run)["loss"])
    assert 0 < done < 20 and [path.name for path in run.glob("step_*")] == [f"step_{done:06d}"]
    run_successfully(RUNS[name][0], "--config", f"runs/{name}/settings.toml", "--resume")
    now = figures_of_steps(run)
    assert now["step"] == list(range(1, 21))
    assert_figures(LOSSES[name], now, RTOL, atol=1e-6)
    assert (run / "step_000020").is_dir()


@pytest.mark.parametrize("name", STOPPED)
def test_an_interrupted_run_refuses_other_settings(net: Path, name: str) -> None:
    config = f"runs/{name}/settings.toml"
    outcome = run_lapwan(RUNS[name][0], "--config", config, "--resume", "--set", "max_grad_norm=0.123")
    assert outcome.code == 2 and "max_grad_norm" in outcome.err and "0.123" in outcome.err, outcome.err


@pytest.mark.parametrize("command", ["train-lora", "train-moe", "srpo"])
def test_a_dry_run_takes_the_stored_cache(net: Path, command: str) -> None:
    more = ("--cache", "cache", "--steps", "5") if command != "srpo" else (
        "--cache", "cache", "--offline", "--reward", "clip=clip_model", "--set", "held_out.count=0")
    outcome = run_successfully(command, "--model", "base", "--device", "cpu", *more, "-o", "now", "--dry-run")
    assert "4 clips" in outcome.out + outcome.err or "4 prompts" in outcome.out + outcome.err, outcome
    assert not (net / "now").exists()
