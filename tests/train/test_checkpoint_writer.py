"""A checkpoint is taken down at its step and written beside the next ones: whole, of its own step, one at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from lapwan.train.callbacks.base import Callback, StepResult
from lapwan.train.checkpoint import CheckpointWriter, Retention, checkpoints, load_checkpoint, start_checkpoint


def parts():
    parameters = {"a": nn.Parameter(torch.arange(4.0))}
    moments = torch.ones(4)
    return parameters, {"optimisers": {"o": {"state": {0: {"m": moments, "same": [moments]}}}}, "step": (1, 2)}, moments


def adapters(folder):
    (folder / "x.safetensors").write_bytes(b"x")
    return [folder / "x.safetensors"]


def test_what_changes_afterwards_is_not_in_it(tmp_path) -> None:
    parameters, rest, moments = parts()
    finish = start_checkpoint(tmp_path, 3, adapters, parameters, rest, Retention())
    assert checkpoints(tmp_path) == [] and not (tmp_path / "x.safetensors").exists()
    with torch.no_grad():
        parameters["a"].add_(1)
        moments.zero_()
    assert finish() == tmp_path / "step_000003" and (tmp_path / "x.safetensors").exists()
    other = {"a": nn.Parameter(torch.zeros(4))}
    found = load_checkpoint(tmp_path / "step_000003", other)
    assert torch.equal(other["a"], torch.arange(4.0)) and found["step"] == (1, 2)
    state = found["optimisers"]["o"]["state"][0]
    assert torch.equal(state["m"], torch.ones(4)) and state["m"] is state["same"][0]


def test_what_fails_leaves_nothing_and_is_raised(tmp_path) -> None:
    writer = CheckpointWriter()
    parameters, rest, _ = parts()
    rest["lock"] = threading.Lock()  # cannot be written
    writer.start(start_checkpoint(tmp_path, 3, adapters, parameters, rest, Retention()))
    with pytest.raises(TypeError, match="cannot pickle"):
        writer.wait()
    writer.wait()  # raised once
    assert list(tmp_path.iterdir()) == []


def test_one_at_a_time(tmp_path) -> None:
    writer, running, most, lock = CheckpointWriter(), [0], [0], threading.Lock()

    def work() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.01)
        with lock:
            running[0] -= 1

    for _ in range(5):
        writer.start(work)
    writer.wait()
    assert most == [1] and running == [0]


class WrittenAfter:
    """A value that a checkpoint can hold, but not write before an event."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __reduce__(self) -> tuple[type, tuple[()]]:
        assert self._event.wait(60)
        return int, ()


class HoldsCheckpointsUntilStep3(Callback):
    name = "gate"

    def __init__(self, run: Path) -> None:
        self._run, self._taken = run, threading.Event()

    def after_update(self, result: StepResult) -> dict[str, float]:
        if result.step == 3:
            assert not checkpoints(self._run)
            self._taken.set()
        return {}

    def state_dict(self) -> dict[str, WrittenAfter]:
        return {"gate": WrittenAfter(self._taken)}


def test_training_goes_on_while_a_checkpoint_is_written(make_lora, tmp_path) -> None:
    """Checkpoint 2 cannot be finished before step 3 is taken; that of the end is there when `fit` returns."""
    trainer = make_lora(output=tmp_path / "run", save_every=2, steps=3)
    trainer.config.run_folder.mkdir()
    trainer.callbacks["gate"] = HoldsCheckpointsUntilStep3(trainer.config.run_folder)
    trainer.fit()
    assert [number for number, _ in checkpoints(trainer.config.run_folder)] == [2, 4, 6]
