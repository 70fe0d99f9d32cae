"""The comparison in miniature: every kind of row, resumption, and its figures against closed forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from examples.comparison.__main__ import main
from examples.comparison.captions import paraphrases
from examples.comparison.families import merge_families, taxonomy_toml
from examples.comparison.report import Results, error_reduction, summarise
from examples.comparison.rows import all_rows, best_lr
from examples.comparison.settings import MIXTURE, SAME_SIZE, ComparisonSettings
from examples.comparison.table import markdown
from examples.comparison.work import arm_settings
from examples.comparison.workspace import Workspace
from lapwan.data.labels import label_caption
from lapwan.data.taxonomy import Taxonomy, load_taxonomy
from lapwan.settings.load import load
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.tiny.instruments import INSTRUMENTS

CONFIG = Path(__file__).parents[2] / "examples" / "comparison" / "comparison.toml"
SMALL = """
tasks = ["t2v"]
lrs = [1e-2, 2e-2]
seeds = [1]
alphas = []
router_lr = 1e-3
ablation_seeds = [1]
timing_steps = 3
clips = { train = 4, validation = 1, test = 2, paraphrases = 4, size = [32, 32], frames = 5 }
sampling = { steps = 1, guidance = 1.0 }
stage1 = { steps = 1, targets = { patterns = { "blocks.7.attn1.*" = 2 } } }
train = { steps = 1 }
plain = { targets = { patterns = { "blocks.7.attn1.*" = 2 } } }
mixture = { targets = { patterns = { "blocks.7.attn1.*" = 1 } } }

[ablations."one expert"]
taxonomy = "one"
router = { top_k = 1 }

[merged.one]
all = ["scissors", "hook", "suction", "other"]
"""


def test_the_whole_comparison_in_miniature_and_going_on_with_it(tmp_path, capsys):
    config, out = tmp_path / "small.toml", tmp_path / "out"
    config.write_text(SMALL, encoding="utf-8")
    command = [str(config), "-o", str(out), "--device", "cpu"]
    assert main(command) == 0
    found = json.loads((out / "result.json").read_text())
    arms = {"none", "plain, continued", "plain, same size", "mixture, router", "mixture, hint", "mixture, wrong hint"}
    assert set(found["tasks"]["t2v"]["arms"]) == arms and found["rows_left"] == []
    assert found["routing"]["captions"]["accuracy"]["n"] == 2 and found["seconds_per_step"]["ratio"] > 0
    assert found["ablations"]["one expert"]["routing_accuracy"] == 1.0
    assert set(found["tasks"]["t2v"]["sweep"]["mixture"]["validation"]) == {"0.01", "0.02"}
    text = (out / "result.md").read_text()
    assert "| mixture, router |" in text and "a linear probe" in text and "python -m examples.comparison" in text
    rows = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("rows/*/row.json")}
    assert set(rows) == {row.name for row in all_rows(load(ComparisonSettings, config))}
    (out / "rows" / "test t2v mixture, hint 1" / "row.json").unlink()
    (out / "result.json").unlink()
    assert main(command) == 0
    again = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("rows/*/row.json")}
    assert {name for name in rows if again[name] != rows[name]} == {"test t2v mixture, hint 1"}
    assert json.loads((out / "result.json").read_text())["tasks"] == found["tasks"]  # the same videos, bit for bit
    capsys.readouterr()
    assert main([*command, "--minutes", "0", "--set", "train.steps=2"]) == 0  # other settings: nothing is taken over
    assert "nothing to report yet" in capsys.readouterr().err


def test_the_published_settings_are_fair(tmp_path):
    """All arms share what the comparison says they share, and the plain LoRA is as large as the mixture."""
    settings = load(ComparisonSettings, CONFIG)
    workspace = Workspace(tmp_path, settings)
    assert len(settings.seeds) >= 3 and len(settings.lrs) >= 3
    runs = {arm: arm_settings(workspace, "t2v", tmp_path, arm, 2e-3, 2)
            for arm in (MIXTURE, SAME_SIZE, "plain, continued")}
    assert isinstance(runs[MIXTURE], TrainMoeSettings) and isinstance(runs[SAME_SIZE], TrainLoraSettings)
    for name in ("steps", "batch_size", "accumulate", "turn", "seed", "roi_weight", "sigma", "low", "schedule",
                 "optimizer", "caption_dropout", "max_grad_norm", "dtype"):
        assert len({str(getattr(run, name)) for run in runs.values()}) == 1, name
    assert {run.data.balance for run in runs.values()} == {0.0} and len({run.data.cache for run in runs.values()}) == 1
    assert runs[MIXTURE].model == runs[SAME_SIZE].model  # the merged stage 1
    assert runs["plain, continued"].init_lora == runs[MIXTURE].model.lora
    assert runs[MIXTURE].router.lr_scale == pytest.approx(settings.router_lr / 2e-3)
    changed = arm_settings(workspace, "t2v", tmp_path, MIXTURE, 2e-3, 1, "no teacher")
    assert changed.routing_loss.teacher_kl == 0.0 and changed.router == runs[MIXTURE].router
    longer = {arm: arm_settings(workspace, "t2v", tmp_path, arm, 2e-3, 1, name).steps for arm, name in
              ((MIXTURE, "twice the steps"), (SAME_SIZE, "plain, same size, twice the steps"))}
    assert set(longer.values()) == {2 * runs[MIXTURE].steps}


def test_an_arms_lr_is_the_best_of_its_sweep_on_validation():
    settings = load(ComparisonSettings, CONFIG, ["lrs=[1e-3, 2e-3, 4e-3]"])

    def rows(*values):
        return {f"sweep t2v mixture {lr:g}": {"validation": {"identity": v}}
                for lr, v in zip(settings.lrs, values, strict=True)}
    assert best_lr(settings, "t2v", MIXTURE, rows(0.4, 0.7, 0.5)) == 2e-3
    assert best_lr(settings, "t2v", MIXTURE, rows(0.7, 0.7, None)) == 1e-3


def test_error_reduction_is_of_all_errors_together():
    better = np.array([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])  # 2 errors
    worse = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])  # 4 errors
    estimate = error_reduction(better, worse)
    assert estimate.mean == pytest.approx(0.5) and estimate.low <= 0.5 <= estimate.high
    same = error_reduction(worse, worse)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)


def made_rows(settings):
    """Two test clips; router right on one, hint on both, the wrong hint shows what it names."""
    named = ["scissors", "grasper"]
    wrong = {"scissors": "hook", "grasper": "scissors"}  # the next family in the taxonomy's order

    def scores(seen):
        own = {f"seen_{name}": [float(s == name) for s in seen] for name in INSTRUMENTS}
        return {"scores": {**own, "identity": [float(s == n) for s, n in zip(seen, named, strict=True)],
                           "tip_accuracy": [None, None]}}

    rows = {"test t2v none": scores(["hook", "hook"])}
    for seed in settings.seeds:
        rows[f"test t2v plain, same size {seed}"] = scores(["hook", "hook"])
        rows[f"test t2v mixture, router {seed}"] = scores(["scissors", "hook"])
        rows[f"test t2v mixture, hint {seed}"] = scores(named)
        rows[f"test t2v mixture, wrong hint {seed}"] = scores([wrong[name] for name in named])
        rows[f"routing t2v {seed}"] = {"families": ["a"], "captions": {
            "right": [1.0, 0.0], "probe": [1.0, 1.0], "confusion": [[1]], "entropy": 0.6}, "without keywords": {
            "right": [1.0, 0.0], "probe": [1.0, 0.0], "confusion": [[1]], "entropy": 0.6}}
    return rows, named


def test_figures_differences_and_goals_follow_from_the_rows():
    settings = load(ComparisonSettings, CONFIG, ['tasks=["t2v"]'])
    rows, named = made_rows(settings)
    found = summarise(Results(settings, rows, named))
    one = found["tasks"]["t2v"]
    assert {arm: own["identity"]["mean"] for arm, own in one["arms"].items()} == {
        "none": 0.0, "plain, same size": 0.0, "mixture, router": 0.5, "mixture, hint": 1.0, "mixture, wrong hint": 0.0}
    difference = next(d for d in one["differences"] if (d["a"], d["b"]) == ("mixture, router", "plain, same size"))
    assert difference["mean"] == 0.5 and difference["relative_error_reduction"]["mean"] == 0.5
    assert one["wrong_hint"]["seen_with_it"]["mean"] == 1.0
    assert one["wrong_hint"]["seen_with_the_router"]["mean"] == 0.0
    goals = {goal["goal"]: goal for goal in found["goals"]}
    assert not goals["routing accuracy, captions"]["met"] and goals["routing accuracy, without keywords"]["met"]
    assert goals["t2v: a wrong hint makes the instrument it names appear"]["met"]
    assert not goals["t2v: identity of the mixture above plain, same size"]["met"]  # the interval begins at 0
    assert "plain, continued" not in str(one["differences"])  # its rows are not there yet
    assert "50.0 % [0.0, 100.0]" in markdown(found, "command")


def written(figure, sign=""):
    """Mean and interval as the comparison's README writes them, in %."""
    mean, low, high = (f"{100 * x:{sign}.1f}" for x in (figure["mean"], *figure["ci95"]))
    return f"{mean}{'' if sign else ' %'} [{low}, {high}]".replace("-", "−")


def test_the_guides_tables_are_the_published_results():
    section = (CONFIG.parent / "README.md").read_text(encoding="utf-8")
    first, longer = (json.loads((CONFIG.parent / name).read_text(encoding="utf-8"))
                     for name in ("result.json", "result_192_steps.json"))
    wanted = []
    for found in (first, longer):
        task = found["tasks"]["t2v"]
        wanted += [written(own["identity"]) for arm, own in task["arms"].items() if "alpha" not in arm]
        wanted += [written(pair, "+") for pair in task["differences"] if pair["a"] == "mixture, router"
                   and (found is first or pair["b"] != "none")]
    wanted += [f"{100 * own['identity']['mean']:.1f} %" for arm, own in first["tasks"]["t2v"]["arms"].items()]
    for own in first["routing"].values():
        wanted += [written(own["accuracy"]), f"probe {100 * own['probe']['mean']:.3g} %"]
    assert [figure for figure in wanted if figure not in section] == [] and len(wanted) > 30
    met = {goal["goal"] for goal in first["goals"] if goal["met"]}
    assert len(met) == 4 and section.count("| met |") == 3 and section.count("| missed |") == 3  # wrong hint twice


def test_paraphrases_hold_no_keyword_and_every_instrument():
    found = paraphrases(40, seed=3)
    assert [instrument for _, instrument in found[:4]] == list(INSTRUMENTS)
    taxonomy = load_taxonomy("surgical4")
    for text, _ in found:
        assert not [m for m in label_caption(text, taxonomy).mentions if not m.action], text
    assert paraphrases(40, seed=3) == found and len({text for text, _ in found}) > 20


def test_merged_families_are_the_unions_and_a_taxonomy_of_one_is_allowed(tmp_path):
    whole = load_taxonomy("surgical4")
    two = merge_families(whole, "two", {"cutting": ["scissors", "hook"], "handling": ["suction", "other"]})
    assert two.keys == ("cutting", "handling") and two.default == 1
    assert label_caption("剪刀剪断组织", two).name == "Cutting" and label_caption("吸引器清理术野", two).index == 1
    one = merge_families(whole, "one", {"all": list(whole.keys)})
    path = tmp_path / "one.toml"
    path.write_text(taxonomy_toml(one), encoding="utf-8")
    assert load_taxonomy(str(path)).keys == ("all",) and isinstance(one, Taxonomy)
