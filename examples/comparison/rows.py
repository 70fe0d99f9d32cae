"""The rows of the comparison: what each does, what it waits for, in the order in which they matter.

How to add an arm: a case in `work.arm_settings` and `work.arm_of`, and its name in `ARMS`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.comparison import work
from examples.comparison.settings import CONTINUED, MIXTURE, NONE, SAME_SIZE, ComparisonSettings, TaskName
from examples.comparison.work import ROW
from examples.comparison.workspace import Workspace
from lapwan import files

ARMS = (MIXTURE, CONTINUED, SAME_SIZE)
METRIC: dict[TaskName, str] = {"t2v": "identity", "i2v": "tip_accuracy"}
CHOICES: dict[str, dict[str, Any]] = {"router": {}, "hint": {"hint": "truth"}, "wrong hint": {"hint": "wrong"}}


# These decide which rows there are; what a row itself depends on is in its name and arguments.
_NOT_IN_KEY = {"tasks", "lrs", "seeds", "alphas", "ablations", "ablation_seeds", "merged", "timing_steps"}


@dataclass(frozen=True)
class Row:
    """One unit of work. `source` is the training row whose result is used, if any.

    `sweeps`, which a row's lr is chosen from, must be done before its arguments are known.
    """

    name: str
    work: Callable[..., dict[str, Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    source: str | None = None
    sweeps: tuple[str, ...] = ()
    alone: bool = False


def folder_of(workspace: Workspace, name: str) -> Path:
    """A row's folder."""
    return workspace.root / "rows" / name


def key_of(workspace: Workspace, row: Row, results: Mapping[str, Any]) -> str:
    """A hash of all that a row depends on: the settings, its arguments, and what it was made from."""
    s, arguments = workspace.settings, row.arguments
    key = [
        s.model_dump(mode="json", exclude=_NOT_IN_KEY), row.name, sorted((k, str(v)) for k, v in arguments.items()),
        s.ablations.get(str(arguments.get("ablation"))), s.merged.get(str(arguments.get("taxonomy"))),
        [results[name]["key"] for name in (*row.after, *row.sweeps) if name in results],
    ]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def read_result(workspace: Workspace, row: Row, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row's result if it is done, with these settings."""
    try:
        stored: dict[str, Any] = json.loads((folder_of(workspace, row.name) / ROW).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return stored if stored.get("key") == key_of(workspace, row, results) else None


def write_row(workspace: Workspace, row: Row, key: str, result: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Write a row's result, last of all it writes."""
    stored = {"key": key, "seconds": seconds, **result}
    files.write_text(folder_of(workspace, row.name) / ROW, json.dumps(stored) + "\n")
    return stored


def all_rows(s: ComparisonSettings) -> list[Row]:
    """Every row, what matters most first."""
    rows = _data(s)
    for task in s.tasks:
        rows.append(Row(f"stage1 {task}", work.train_stage1, {"task": task}, (f"cache {task}",)))
        rows += [_sweep(task, arm, lr, s.seeds[0]) for arm in ARMS for lr in s.lrs]
        rows.append(_tested(task, NONE, None, "none", {}, (f"stage1 {task}",)))
        for arm in ARMS:
            rows += [_seeded(s, task, arm, seed) for seed in s.seeds[1:]]
    for task in s.tasks:
        for seed in s.seeds:
            rows += _tests(s, task, seed)
    task = s.tasks[0]
    for name, changes in s.ablations.items():
        arm = str(changes.get("arm", MIXTURE))
        for seed in s.ablation_seeds:
            trained = Row(f"train {task} {name} {seed}", work.train_arm,
                          {"task": task, "arm": arm, "seed": seed, "ablation": name},
                          (f"stage1 {task}", f"labels {_taxonomy_of(changes)}"), sweeps=sweep_names(s, task, arm))
            rows += [trained, _tested(task, arm, trained.name, f"{name} {seed}", {})]
            if arm == MIXTURE:
                rows.append(Row(f"routing {task} {name} {seed}", work.routing, {"task": task}, (trained.name,),
                                trained.name))
    rows.append(Row("timing", work.timing, {}, (f"stage1 {task}",), alone=True))
    return rows


def _data(s: ComparisonSettings) -> list[Row]:
    parts = ("train", "validation", "test")
    rows = [Row(f"scenes {part}", work.scenes, {"part": part}) for part in parts]
    used = dict.fromkeys([work.TAXONOMY, *map(_taxonomy_of, s.ablations.values())])
    rows += [Row(f"labels {name}", work.labels, {"taxonomy": name}, ("scenes train",)) for name in used]
    return rows + [Row(f"cache {task}", work.caches, {"task": task}, (f"labels {work.TAXONOMY}",)) for task in s.tasks]


def _taxonomy_of(changes: Mapping[str, Any]) -> str:
    return str(changes.get("taxonomy", work.TAXONOMY))


def sweep_names(s: ComparisonSettings, task: TaskName, arm: str) -> tuple[str, ...]:
    """The training rows that an arm's lr is chosen from."""
    return tuple(f"sweep {task} {arm} {lr:g}" for lr in s.lrs)


def _sweep(task: TaskName, arm: str, lr: float, seed: int) -> Row:
    return Row(f"sweep {task} {arm} {lr:g}", work.train_arm, {"task": task, "arm": arm, "lr": lr, "seed": seed},
               (f"stage1 {task}", "scenes validation"))


def _seeded(s: ComparisonSettings, task: TaskName, arm: str, seed: int) -> Row:
    return Row(f"train {task} {arm} {seed}", work.train_arm, {"task": task, "arm": arm, "seed": seed},
               (f"stage1 {task}",), sweeps=sweep_names(s, task, arm))


def trained_name(s: ComparisonSettings, task: TaskName, arm: str, seed: int, results: Mapping[str, Any]) -> str:
    """The training row of an arm and seed: at the first seed, the sweep's best."""
    if seed == s.seeds[0]:
        return f"sweep {task} {arm} {best_lr(s, task, arm, results):g}"
    return f"train {task} {arm} {seed}"


def best_lr(s: ComparisonSettings, task: TaskName, arm: str, results: Mapping[str, Any]) -> float:
    """The lr of the sweep with the best validation figure; of equals the smallest."""
    def figure(lr: float) -> float:
        value = results[f"sweep {task} {arm} {lr:g}"]["validation"][METRIC[task]]
        return -1.0 if value is None else float(value)

    return max(sorted(s.lrs), key=figure)


def _tested(
    task: TaskName, arm: str, source: str | None, name: str, choice: Mapping[str, Any], after: Sequence[str] = ()
) -> Row:
    needs = (*after, "scenes test", *(() if source is None else (source,)))
    return Row(f"test {task} {name}", work.test_arm, {"task": task, "arm": arm, "choice": dict(choice)}, needs, source)


def _tests(s: ComparisonSettings, task: TaskName, seed: int) -> list[Row]:
    """An arm's row of the first seed is only known after the sweep: until then `source` is the arm."""
    rows = []
    for arm, choices in ((MIXTURE, CHOICES), (CONTINUED, {"": {}}), (SAME_SIZE, {"": {}})):
        chosen = dict(choices)
        if arm == MIXTURE:
            chosen |= {f"alpha {alpha:g}": {"alpha_expert": alpha} for alpha in s.alphas}
        for label, choice in chosen.items():
            rows.append(_of_seed(s, task, arm, seed, f"{f'{arm}, {label}' if label else arm} {seed}", choice))
    mixture = _of_seed(s, task, MIXTURE, seed, f"{MIXTURE} {seed}", {})
    return [*rows, Row(f"routing {task} {seed}", work.routing, {"task": task}, mixture.after, mixture.source,
                       mixture.sweeps)]


def _of_seed(
    s: ComparisonSettings, task: TaskName, arm: str, seed: int, name: str, choice: Mapping[str, Any]
) -> Row:
    first = seed == s.seeds[0]
    needs = ("scenes test",) if first else ("scenes test", f"train {task} {arm} {seed}")
    return Row(f"test {task} {name}", work.test_arm, {"task": task, "arm": arm, "choice": dict(choice)}, needs,
               f"first {arm}" if first else f"train {task} {arm} {seed}", sweep_names(s, task, arm))
