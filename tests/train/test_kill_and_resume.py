"""A real process killed with SIGKILL in the middle of each stage, resumed, against the uninterrupted run."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from command_line import Started
from forkserver import PATIENCE
from safetensors.torch import load_file

from lapwan.train.checkpoint import checkpoints

STEPS = 16  # of each noise expert


def arguments(command: str, run: Path, cache: Path) -> list[object]:
    return [
        command, "--model", "tiny", "--cache", cache, "-o", run, "--steps", STEPS, "--save-every", "4", "--lr", "1e-2",
        "--device", "cpu", "--set", "targets.last_blocks=2", "--set", "targets.ffn_last_blocks=1", "--set", "turn=3",
        "--set", "accumulate=2", "--set", "caption_dropout=0.2", "--set", "ema_decay=0.9",
        "--set", "dropout.rank=0.1", *OWN[command],
    ]


# What has a state or draws of its own besides what every run has.
OWN = {"train-lora": (), "train-moe": tuple(word for setting in (
    "router.sigma=true", "router.lr_scale=0.1", "expert_dropout=0.3", "routing_loss.teacher_kl_end=0.1",
    "data.balance=1", "roi_fallback=motion", "routing_watch.every=6", "routing_watch.after=6", "shared_experts=true",
) for word in ("--set", setting))}


@pytest.mark.parametrize("command", ["train-lora", "train-moe"])
def test_resume_after_kill_9_is_bitwise_the_uninterrupted_run(succeed, command, tmp_path, t2v_cache):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    victim = Started(*arguments(command, killed, t2v_cache))
    deadline = time.monotonic() + PATIENCE
    while not checkpoints(killed) and time.monotonic() < deadline and victim.poll() is None:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    ended = victim.wait()
    assert ended.code == -signal.SIGKILL, ended
    done = [step for step, _ in checkpoints(killed)]
    assert done and done[-1] < 2 * STEPS, "the process was to die in the middle"
    again = Started(*arguments(command, killed, t2v_cache), "--resume")
    succeed(*arguments(command, whole, t2v_cache))
    ended = again.wait()
    assert ended.code == 0 and f"at step {done[-1]} of {2 * STEPS}" in ended.err, ended
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    assert files == (["lapwan.safetensors"] if command == "train-moe" else
                     ["lapwan_high_noise.safetensors", "lapwan_low_noise.safetensors"])
    for name in files:
        ours, theirs = load_file(killed / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    state = [load_file(run / f"step_{2 * STEPS:06d}" / "state" / "trained.safetensors") for run in (whole, killed)]
    assert all(torch.equal(state[0][key], state[1][key]) for key in state[0])
