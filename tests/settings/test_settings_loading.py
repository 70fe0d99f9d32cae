"""Precedence of the five sources, and problems placed where they were said."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from lapwan.commands.table import COMMANDS
from lapwan.errors import UserError
from lapwan.names import NoiseExpert
from lapwan.settings.aliases import OLD_DEFAULTS, RUN_HEADER, with_old_defaults
from lapwan.settings.base import Settings, to_toml
from lapwan.settings.load import _sections, load
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.settings.train_moe import TrainMoeSettings

GOOD = 'output = "run"\nsteps = 10\n[data]\ncache = "cache"\n'


@pytest.fixture
def toml(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "stage1.toml"
        path.write_text(text, encoding="utf-8")
        return path
    return write


def test_precedence_is_option_set_environment_file_default(toml):
    config = toml(GOOD + "[optimizer]\nlr = 1e-5\n")
    lr = [load(TrainLoraSettings, config, sets, options, env).optimizer.lr for sets, options, env in (
        ([], {}, {}),
        ([], {}, {"LAPWAN_OPTIMISER__LR": "2e-5"}),
        (["optimizer.lr=3e-5"], {}, {"LAPWAN_OPTIMISER__LR": "2e-5"}),
        (["optimizer.lr=3e-5"], {"optimizer.lr": "4e-5"}, {"LAPWAN_OPTIMISER__LR": "2e-5"}),
    )]
    assert lr == [1e-5, 2e-5, 3e-5, 4e-5]
    assert load(TrainLoraSettings, toml(GOOD), environment={}).optimizer.lr == 1e-4


def test_foreign_environment_names_are_left_alone(toml):
    config = toml(GOOD)
    foreign = {"LAPWAN_CACHE_DIR": "/somewhere", "LAPWAN_X": "1"}
    assert load(TrainLoraSettings, config, environment=foreign) == load(TrainLoraSettings, config, environment={})


def test_every_problem_is_reported_at_once_with_value_and_line(toml):
    config = toml('output = "run"\nsteps = "many"\nbatch_sise = 2\n[data]\ncache = "c"\n[optimizer]\nlr = -1.0\n'
                  'weigth_decay = 0.1\n')
    with pytest.raises(UserError) as caught:
        load(TrainLoraSettings, config, ["targets.q=-3"], environment={"LAPWAN_SEED": "x"})
    text = str(caught.value)
    assert text.startswith("6 problems:")
    for piece in (
        "stage1.toml, line 2: steps = 'many'",
        "stage1.toml, line 3: unknown key 'batch_sise' (did you mean 'batch_size'?)",
        "stage1.toml, line 7: optimizer.lr = -1.0: must be greater than 0",
        "stage1.toml, line 8: unknown key 'optimizer.weigth_decay' (did you mean 'weight_decay'?)",
        "--set targets.q: targets.q = -3",
        "environment LAPWAN_SEED: seed = 'x'",
    ):
        assert piece in text, piece


def test_a_bad_environment_value_names_its_variable(toml):
    with pytest.raises(UserError, match=r"environment LAPWAN_SEED: seed = 'x'"):
        load(TrainLoraSettings, toml(GOOD), environment={"LAPWAN_SEED": "x"})


@pytest.mark.parametrize(("text", "message"), [
    ("output = =\n", r"is not valid TOML: .*line 1"),
    ('output = "r"\nsteps = 1\n', r"'data' is required"),
    (GOOD + "[high]\nxyz = 3\n", r"unknown key 'high.xyz'; known here: alpha, alpha_schedule, dropout, lr"),
    (GOOD.replace("steps", "epochs = 1\nsteps"), "give exactly one of steps, epochs and"),
    (GOOD.replace("steps", 'noise_experts = ["high"]\nsteps') + "[low]\nsteps = 3\n",
     r"\[low\] is set, but noise_experts"),
])
def test_one_line_each(toml, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load(TrainLoraSettings, toml(text), environment={})
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_broken_set():
    with pytest.raises(UserError, match=r"no such file: nowhere.toml"):
        load(TrainLoraSettings, Path("nowhere.toml"))
    with pytest.raises(UserError, match=r"--set optimizer.lr: expected section.key=value"):
        load(TrainLoraSettings, None, ["optimizer.lr"])


def test_resolved_settings_reproduce_themselves_from_anywhere(toml, tmp_path, monkeypatch):
    config = toml(GOOD + "[router]\nkind = \"rule\"\n[low]\nsteps = 5\n[low.targets]\nlast_blocks = \"all\"\n")
    first = load(TrainMoeSettings, config, environment={})
    text = to_toml(first)
    assert Path(tomllib.loads(text)["output"]).is_absolute()
    monkeypatch.chdir(tmp_path.parent)
    again = load(TrainMoeSettings, toml(text), environment={})
    assert to_toml(again) == text
    assert again.of(NoiseExpert.LOW, 1).targets.last_blocks == "all" and again.of(NoiseExpert.LOW, 1).steps == 5
    assert again.of(NoiseExpert.HIGH, 1).targets.last_blocks == 8


OLD_NAMES = """
output = "run"
steps = 5
experts = ["high"]
[data]
cache = "cache"
[optimiser]
type = "adamw"
lr = 2e-4
[high.optimiser]
lr = 3e-4
"""


def test_older_names_of_keys_are_read_from_every_source(tmp_path):
    (tmp_path / "old.toml").write_text(OLD_NAMES)
    settings = load(TrainLoraSettings, tmp_path / "old.toml", ["optimiser.betas=[0.8, 0.9]"],
                    environment={"LAPWAN_OPTIMISER__WEIGHT_DECAY": "0.5", "LAPWAN_SEED": "7"})
    assert settings.noise_experts == (NoiseExpert.HIGH,) and settings.seed == 7
    assert (settings.optimizer.lr, settings.optimizer.weight_decay, settings.optimizer.betas) == (2e-4, 0.5, (0.8, 0.9))
    assert settings.of(NoiseExpert.HIGH, 1).optimizer.lr == 3e-4
    assert TrainLoraSettings.model_validate(tomllib.loads(OLD_NAMES)).noise_experts == (NoiseExpert.HIGH,)
    assert "optimiser" not in to_toml(settings)


def test_a_stronger_source_wins_whatever_name_it_uses(tmp_path):
    (tmp_path / "old.toml").write_text(OLD_NAMES)
    settings = load(TrainLoraSettings, tmp_path / "old.toml", ["optimizer.lr=1e-5", 'noise_experts=["high"]'],
                    environment={})
    assert settings.optimizer.lr == 1e-5
    (tmp_path / "both.toml").write_text(OLD_NAMES + "[optimizer]\nlr = 1.0\n")
    with pytest.raises(UserError, match="optimiser is the older name of optimizer, and both are given"):
        load(TrainLoraSettings, tmp_path / "both.toml", environment={})
    (tmp_path / "both.toml").write_text(OLD_NAMES + "[high.optimizer]\nlr = 1.0\n")
    with pytest.raises(UserError, match=r"\[high\] optimiser is the older name of optimizer, and both are given"):
        load(TrainLoraSettings, tmp_path / "both.toml", environment={})


@pytest.mark.parametrize("names", [("OPTIMISER", "OPTIMIZER"), ("OPTIMIZER", "OPTIMISER")])
def test_both_names_in_the_environment_are_refused_in_any_order(names, toml):
    environment = {f"LAPWAN_{name}__LR": "1e-4" for name in names}
    with pytest.raises(UserError, match="LAPWAN_OPTIMISER__LR is the older name of LAPWAN_OPTIMIZER__LR, and both"):
        load(TrainLoraSettings, toml(GOOD), environment=environment)


@pytest.mark.parametrize(("old", "bad", "message"), [
    ("lr = 2e-4", "lr = -1.0", r"old.toml, line 9: optimizer.lr = -1.0"),
    ('["high"]', '["hihg"]', r"old.toml, line 4: noise_experts\[0\] = 'hihg'"),
])
def test_an_error_in_an_older_key_is_found_in_the_file(old, bad, message, tmp_path):
    (tmp_path / "old.toml").write_text(OLD_NAMES.replace(old, bad))
    with pytest.raises(UserError, match=message):
        load(TrainLoraSettings, tmp_path / "old.toml", environment={})


def test_an_error_names_the_older_key_that_was_given(toml):
    with pytest.raises(UserError, match=r"environment LAPWAN_OPTIMISER__LR: optimizer.lr = '-1'"):
        load(TrainLoraSettings, toml(GOOD), environment={"LAPWAN_OPTIMISER__LR": "-1"})
    with pytest.raises(UserError, match=r"--set optimiser.lr: optimizer.lr = -1"):
        load(TrainLoraSettings, toml(GOOD), ["optimiser.lr=-1"], environment={})


def test_settings_of_an_older_version_keep_what_was_the_default():
    table = {1: {"router.kind": "text", "seed": 1}, 2: {"seed": 2, "dropout.rank": 0.5}}
    assert with_old_defaults({"router": {"top_k": 2}}, 1, table) == {
        "router": {"top_k": 2, "kind": "text"}, "seed": 1, "dropout": {"rank": 0.5}}
    assert with_old_defaults({"seed": 9}, 2, table) == {"seed": 9, "dropout": {"rank": 0.5}}
    assert with_old_defaults({"seed": 9}, 3, table) == {"seed": 9}


def test_a_runs_settings_without_a_version_are_of_the_first(tmp_path, monkeypatch):
    """As `--config` too; a file that a user wrote has today's defaults."""
    monkeypatch.setitem(OLD_DEFAULTS, 1, {"seed": 7})
    text = 'output = "run"\nsteps = 1\ndata = {cache = "cache"}\n'
    seeds = {}
    for name, first in (("user", ""), ("run", f"{RUN_HEADER}\n"), ("new", f"{RUN_HEADER}\nsettings_version = 2\n")):
        (tmp_path / f"{name}.toml").write_text(first + text)
        seeds[name] = load(TrainLoraSettings, tmp_path / f"{name}.toml", environment={}).seed
    assert seeds == {"user": 42, "run": 7, "new": 42}


@pytest.mark.parametrize("version", ["99", "0", "'2'", "true"])
def test_settings_of_a_newer_version_are_refused(version, tmp_path):
    (tmp_path / "new.toml").write_text(f"settings_version = {version}\nsteps = 1\n")
    with pytest.raises(UserError, match="settings_version"):
        load(TrainLoraSettings, tmp_path / "new.toml", environment={})


def dotted_keys(model: type[Settings], prefix: str = ""):
    for name, info in model.model_fields.items():
        yield prefix + name
        for section in _sections(info.annotation):
            yield from dotted_keys(section, f"{prefix}{name}.")


def whole_numbers(model: type[Settings], prefix: str = ""):
    """Dotted keys whose values are or hold whole numbers."""
    for name, info in model.model_fields.items():
        if re.search(r"\bint\b", str(info.annotation)):
            yield prefix + name
        for section in _sections(info.annotation):
            yield from whole_numbers(section, f"{prefix}{name}.")


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: row.name)
def test_every_whole_number_has_bounds(row):
    for key in dict.fromkeys(whole_numbers(row.settings_model())):
        refused = 0
        for value in (10**19, [10**19], [10**19, 10**19], {"a": 10**19}):
            with pytest.raises(UserError) as caught:
                load(row.settings_model(), None, (), {key: value}, environment={})
            texts = [line for line in str(caught.value).splitlines() if f": {key}" in line]
            refused += any(text in line for line in texts for text in ("at most", "less than"))
        assert refused, key


@pytest.mark.parametrize(("command", "values"), [
    ("generate", {"size": "99999999x99999999"}), ("generate", {"size": "8192x8192", "num_frames": 10001}),
    ("generate", {"steps": 10**8}), ("cache", {"size": "99999999x99999999"}), ("cache", {"num_frames": "99999"}),
    ("evaluate", {"videos.size": "99999999x99999999"}), ("srpo", {"size": "16x99999999"}),
    ("train-lora", {"preview.size": [16, 99999999]}), ("train-lora", {"targets.q": 10**6}),
    ("train-lora", {"steps": 10**7}), ("train-moe", {"batch_size": 10**6}), ("merge", {"rank": 10**6}),
    ("split", {"stride": 1e-12}), ("demo", {"clips": 10**6}),
])
def test_absurd_sizes_are_refused_before_memory_is_taken(command, values):
    row = next(row for row in COMMANDS if row.name == command)
    with pytest.raises(UserError) as caught:
        load(row.settings_model(), None, (), values, environment={})
    assert any(text in str(caught.value) for text in ("at most", "less than or equal", "greater than or equal"))


WRONG = ([], [1, {}], {}, {"x": 1}, "wrong", "", 12.5, -1, True)
# pydantic's words, and Python's names of types.
NOT_FOR_USERS = ("pydantic", "Settings", "Input should", "validation error", "type=", " | ", "valid ", "instance of",
                 "unable to", "Unable", "String", "constrained", "literal[", "function-", "dict[", "<class")


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: row.name)
def test_no_message_about_a_wrong_value_shows_a_type_of_python(row):
    keys = list(dict.fromkeys(dotted_keys(row.settings_model())))
    keys += [f"high.{key}" for key in keys if "high" in keys]
    refused = 0
    for key in keys:
        for value in WRONG:
            try:
                load(row.settings_model(), None, (), {key: value}, environment={})
            except UserError as error:
                refused += 1
                assert not [words for words in NOT_FOR_USERS if words in str(error)], (key, value, str(error))
    assert refused > 3 * len(keys)


@pytest.mark.parametrize(("text", "message"), [
    ("targets.last_blocks = 1.5\n", "targets.last_blocks = 1.5: must be a whole number or 'all'"),
    ("model = 3\n", "model = 3: must be a text or a table of keys and values"),
    ("init_lora.x = 'a'\n", "init_lora.x = 'x': must be 'high' or 'low'"),
    ("high.optimizer.lr = 'fast'\n", "high.optimizer.lr = 'fast': must be a number"),
    ("name = 'a/b'\n", "name = 'a/b': must be letters, digits, '.', '_' and '-'"),
    ("noise_experts = []\n", "noise_experts = []: must hold at least 1, has 0"),
    ("model = {x = 1}\n", "'model.model' is required"),
])
def test_a_wrong_form_is_told_in_the_words_of_a_file(toml, text, message):
    with pytest.raises(UserError) as caught:
        load(TrainLoraSettings, toml(text + GOOD), environment={})
    assert message in str(caught.value) and "model.str" not in str(caught.value)


def test_a_file_of_yaml_is_named_as_what_it_is(tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text("job: extension\n", encoding="utf-8")
    with pytest.raises(UserError, match="is YAML, as ai-toolkit's"):
        load(TrainLoraSettings, config, environment={})
