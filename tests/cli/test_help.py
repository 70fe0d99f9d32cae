"""What a help, a completion and an unknown command may import, and what they answer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from lapwan.cli import app
from lapwan.commands.table import COMMANDS
from lapwan.lora.formats import write_lora
from lapwan.lora.state import AdapterState, LowRank
from lapwan.tiny.dataset import write_dataset

ANSWERS = """
import contextlib, io, os, sys
from lapwan.cli import main

def answer(*arguments, **environment):
    sys.argv = ["lapwan", *arguments]
    os.environ.update(environment)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    for name in environment:
        del os.environ[name]
    return code, out.getvalue()

def imported(*names):
    return [name for name in names if name in sys.modules]
"""


def in_a_new_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", ANSWERS + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def complete(*words: str) -> list[str]:
    environment = {"_LAPWAN_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("lapwan", *words)),
                   "COMP_CWORD": str(len(words))}
    done = CliRunner().invoke(app, [], env=environment, prog_name="lapwan")
    assert done.exit_code == 0, done.output
    return done.stdout.split()


def test_answers_about_all_commands_import_no_settings():
    in_a_new_process("""
assert answer("--help")[0] == answer("-h")[0] == answer("--version")[0] == 0
assert answer()[0] == answer("nonsense")[0] == answer("--nonsense")[0] == 2
assert answer(_LAPWAN_COMPLETE="complete_bash", COMP_WORDS="lapwan gen", COMP_CWORD="1") == (0, "generate\\n")
assert not imported("torch", "pydantic", "lapwan.settings.base")
""")


def test_the_help_of_a_command_imports_its_settings_only():
    in_a_new_process("""
assert answer("label", "--help")[0] == 0
assert imported("lapwan.settings.label") and not imported("lapwan.settings.train", "lapwan.settings.generate", "torch")
assert answer("generate", "--help")[0] == 0
assert imported("lapwan.settings.generate") and not imported("lapwan.settings.train", "torch")
""")


def test_helps_import_no_torch_and_build_no_validators():
    in_a_new_process("""
from lapwan.commands.table import COMMANDS
for command in COMMANDS:
    assert answer(command.name, "--help")[0] == 0
    assert answer(command.name, "--no-such-option")[0] == 2

from lapwan.settings.base import Settings

def models(model):
    return [model, *(m for subclass in model.__subclasses__() for m in models(subclass))]

built = [model.__name__ for model in models(Settings) if model.__pydantic_complete__]
assert len(models(Settings)) > 30 and not built, f"an instance as a default builds them at import: {built}"
assert not imported("torch")
""")


def test_commands_that_draw_nothing_import_no_matplotlib(tmp_path):
    lora = {"blocks.0.attn1.to_q": LowRank(torch.randn(2, 6), torch.randn(6, 2), 2.0)}
    write_lora(tmp_path / "a_high.safetensors", AdapterState(lora))
    write_dataset(tmp_path / "clips", clips=1, seed=1, size=(32, 32), frames=5)
    in_a_new_process(f"""
os.chdir({str(tmp_path)!r})
assert answer("--help")[0] == 0
assert answer("label", "clips/clips.jsonl", "-o", "labels.jsonl")[0] == 0
assert answer("inspect-weights", "a_high.safetensors")[0] == 0
assert not imported("matplotlib")
assert answer("inspect-weights", "a_high.safetensors", "--plot", "a.png")[0] == 0
assert imported("matplotlib") and not imported("matplotlib.pyplot")
""")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_row_and_example_of_the_table_are_in_the_helps(command):
    runner = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"})
    assert command.help in runner.invoke(app, ["--help"]).stdout
    shown = runner.invoke(app, [command.name, "--help"]).stdout
    assert command.help in shown
    assert command.example.split(" -o ")[0] in shown


@pytest.mark.parametrize(("typed", "meant"), [("train_lora", "train-lora"), ("evalute", "evaluate")])
def test_an_unknown_command_gets_a_suggestion(typed, meant):
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, [typed])
    assert f"no such command '{typed}'; did you mean '{meant}'" in str(done.exception)


def test_completion_of_commands_and_options():
    assert complete("") == [command.name for command in COMMANDS]
    assert complete("gen") == ["generate"]
    assert complete("train-") == ["train-lora", "train-moe", "train-judge"]
    assert complete("generate", "--neg") == ["--negative-prompt"]
    assert complete("generate", "--moe", "x.safetensors", "--dry") == ["--dry-run"]
    assert complete("inspect-weights", "--pre") == ["--preset"]
    assert complete("generate", "--moe", "") == []  # a path: the shell's own completion


def test_completion_is_set_up_by_an_option_of_the_root_only():
    runner = CliRunner(env={"COLUMNS": "80"})
    (line,) = (line for line in runner.invoke(app, ["--help"]).stdout.splitlines() if "completion" in line)
    assert line.split("  ")[0] == "│ --install-completion"
    assert "completion" not in runner.invoke(app, ["label", "--help"]).stdout
    script = runner.invoke(app, [], env={"_LAPWAN_COMPLETE": "source_zsh"}, prog_name="lapwan").stdout.strip()
    assert script.startswith("#compdef lapwan") and "_LAPWAN_COMPLETE=complete_zsh lapwan" in script
