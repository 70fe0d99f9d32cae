"""A checkpoint is data: whatever its state holds, a run resumes from it or says what is wrong, and executes nothing."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lapwan.errors import UserError
from lapwan.train.checkpoint import checkpoints, score
from lapwan.train.trainer import Trainer


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def damaged(rest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The state with each key missing, or of another type."""
    for key in rest:
        yield f"{key} missing", {name: value for name, value in rest.items() if name != key}
        for wrong in (3, "text", [1], {"a": 1}):
            yield f"{key} = {wrong!r}", rest | {key: wrong}
    yield from (("a list", [rest]), ("nothing", {}), ("a number", 3))


@pytest.fixture
def saved(make_lora: Callable[..., Trainer]) -> tuple[Trainer, Path]:
    trainer = make_lora()
    trainer.config.run_folder.mkdir()
    trainer.fit()
    return make_lora(), checkpoints(trainer.config.run_folder)[-1][1]


def test_any_state_is_resumed_or_refused(saved: tuple[Trainer, Path], monkeypatch: pytest.MonkeyPatch,
                                         tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    trainer, folder = saved
    file = folder / "state" / "rest.pt"
    good, rest = file.read_bytes(), torch.load(file, weights_only=True)
    assert trainer.resume()
    refused = 0
    contents: list[tuple[str, Callable[[], object]]] = [
        (name, lambda value=value: torch.save(value, file)) for name, value in damaged(rest)]
    contents += [(name, lambda data=data: file.write_bytes(data)) for name, data in (
        ("old code", pickle.dumps(_Code(), protocol=2)), ("cut", good[:-200]), ("empty", b""), ("text", b"hello"))]
    contents += [("code", lambda: torch.save({"a": _Code()}, file)), ("gone", file.unlink)]
    for name, write in contents:
        write()
        try:
            trainer.resume()
        except UserError as error:
            refused += 1
            assert str(folder) in str(error) and len(str(error).splitlines()) == 1, (name, str(error))
    assert refused > 20 and not (tmp_path / "executed").exists()
    file.write_bytes(good)
    (folder / "state" / "trained.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot resume from"):
        trainer.resume()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"validation": "low"}', '{"validation": [1]}', "\0", "nan"])
def test_a_score_is_a_number(text: str, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    assert score(tmp_path) is None
    (tmp_path / "state" / "score.json").write_text('{"validation": NaN}')
    assert score(tmp_path) != score(tmp_path)
    (tmp_path / "state" / "score.json").write_text(text)
    with pytest.raises(UserError, match=r"score\.json"):
        score(tmp_path)


def test_a_schedule_of_other_types_is_refused_before_the_next_step(saved: tuple[Trainer, Path]) -> None:
    trainer, folder = saved
    file = folder / "state" / "rest.pt"
    rest = torch.load(file, weights_only=True)
    state = rest["lr_schedules"]["high"]
    for key, value in (("base_lrs", 3), ("base_lrs", []), ("_step_count", {}), ("last_epoch", "8")):
        torch.save(rest | {"lr_schedules": rest["lr_schedules"] | {"high": state | {key: value}}}, file)
        with pytest.raises(UserError, match=f"'{key}' of the lr schedule"):
            trainer.resume()


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of nested tables and lists with one value replaced."""
    if not path:
        return value
    if isinstance(tree, dict):
        return {**tree, path[0]: replaced(tree[path[0]], path[1:], value)}
    parts = [replaced(part, path[1:], value) if i == path[0] else part for i, part in enumerate(tree)]
    return type(tree)(parts)


@pytest.mark.parametrize(("path", "value"), [
    (("skipped",), None), (("skipped",), "x"), (("skipped",), -1), (("tracks", "high", 0), None),
    (("tracks", "high", 1), "x"), (("tracks", "low"), [1, 2]), (("kinds", "high"), 3), (("identity",), {"a": 1}),
    (("dropped",), {"steps": ["x"], "times": {}}), (("watchers", "weights", "before", "high", "delta_norm"), "x"),
    (("watchers", "weights", "step"), None), (("watchers", "weights", "before", "high"), 7),
    (("optimisers", "high", "param_groups", 0, "lr"), float("nan")),
    (("optimisers", "high", "param_groups", 0, "betas"), "x"),
    # A fused optimizer would write beyond the end of it.
    (("optimisers", "high", "state", 0, "exp_avg"), torch.zeros(1)),
])
def test_a_value_of_another_type_or_shape_is_refused_at_resume(
    saved: tuple[Trainer, Path], path: tuple[Any, ...], value: Any
) -> None:
    trainer, folder = saved
    file = folder / "state" / "rest.pt"
    torch.save(replaced(torch.load(file, weights_only=True), path, value), file)
    with pytest.raises(UserError, match=re.escape(str(folder))):
        trainer.resume()


def test_an_optimizer_that_cannot_use_its_state_is_a_line(saved: tuple[Trainer, Path]) -> None:
    trainer, folder = saved
    file = folder / "state" / "rest.pt"
    path = ("optimisers", "high", "state", 0)
    torch.save(replaced(torch.load(file, weights_only=True), path, {"step": torch.tensor(3.0)}), file)
    assert trainer.resume()
    optimizer = trainer.optimizers["high"]
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(UserError, match="optimizer's state"):
        optimizer.step()
