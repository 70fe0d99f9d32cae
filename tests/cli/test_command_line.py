"""The command line as users type it: help, exit codes, older names of options, examples.

Few tests start a process of its own, since each pays for imports; what `python -m lapwan` adds is held by those.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from adapter_cases import write_random_lora, write_random_mixture
from command_line import Ran, run_lapwan, run_successfully
from typer.main import get_command

from lapwan import __version__
from lapwan.cli import app
from lapwan.cli_aliases import rewrite
from lapwan.commands.table import COMMANDS
from lapwan.lora.assign import assign
from lapwan.models.base import Base
from lapwan.models.spec import read_spec
from lapwan.names import NoiseExpert
from lapwan.sampling.jobs import make_video_jobs
from lapwan.settings.base import flag_fields
from lapwan.settings.generate import GenerateSettings
from lapwan.settings.load import load
from lapwan.tiny.dataset import write_dataset
from lapwan.tiny.model import tiny_folder

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


WIDE = {"COLUMNS": "200", "NO_COLOR": "1"}


def program(*arguments: str, cwd: Path) -> Ran:
    done = subprocess.run([sys.executable, "-m", "lapwan", *arguments], cwd=cwd, capture_output=True, text=True,
                          encoding="utf-8", timeout=120)
    return Ran(done.returncode, done.stdout, done.stderr)


def test_help_lists_every_command_and_imports_no_torch():
    code = ("import sys; sys.argv = ['lapwan', '--help']\nfrom lapwan.cli import main\n"
            "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert command.name in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_command_help_shows_every_flag_with_its_description(command):
    done = run_successfully(command.name, "--help", environment={**WIDE, "COLUMNS": "160"})
    text = re.sub(r"[\s│]+", "", done.out)
    for field in flag_fields(command.settings_model()):
        assert field.info.description, f"{field.key} has no help"
        assert re.sub(r"\s+", "", field.info.description) in text, field.key
        if not field.flag.positional:
            assert field.long_name.split("/")[0] in done.out
    assert "<bool>" not in done.out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_example_of_the_help_uses_real_options(command):
    known = {f.long_name.split("/")[0] for f in flag_fields(command.settings_model())} | {"-o"}
    known |= {name for f in flag_fields(command.settings_model()) for name in f.flag.names}
    used = {word for word in command.example.split() if word.startswith("-")}
    assert used <= known


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_every_example_passes_a_dry_run(example, example_inputs):
    command = re.search(r"lapwan (\S+) --config", example.read_text(encoding="utf-8"))
    assert command is not None, f"{example} does not say its command in a comment"
    done = run_successfully(command[1], "--config", example, "--dry-run", "--overwrite", cwd=example_inputs)
    assert "dry run" in done.err or done.out


@pytest.fixture(scope="module")
def example_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with what the examples expect: labelled clips, their cache, as the README makes them,
    and adapters named as the two stages name them."""
    folder = tmp_path_factory.mktemp("examples")
    write_dataset(folder / "clips", clips=8, seed=1, size=(64, 64), frames=17, test_share=0.5)
    for arguments in (
        ("label", "clips/clips.jsonl", "-o", "clips/labels.jsonl"),
        ("cache", "--dataset", "clips/labels.jsonl", "--model", "tiny", "-o", "cache", "--size", "32x32",
         "--num-frames", "5"),
    ):
        run_successfully(*arguments, cwd=folder)
    loras = [tuple(text.split("=", 1)) for text in write_random_lora(folder / "stage1")]
    merged = assign([(noise_expert, Path(path), 1.0) for noise_expert, path in loras], tuple(NoiseExpert))
    write_random_mixture(folder / "stage2" / "lapwan.safetensors", Base(read_spec(tiny_folder("t2v")), merged))
    return folder


@pytest.mark.parametrize(("arguments", "message"), [
    (("train-lora", "-o", "x", "--cache", "nowhere", "--steps", "1"), "error: no cache folder nowhere"),
    (("train-lora", "-o", "x", "--steps", "1"), "'data' is required"),
    (("train-lora", "-o", "x", "--cache", "c", "--steps", "none"), "error: --steps: steps = 'none'"),
    (("train-moe", "--config", "no.toml"), "error: no such file: no.toml"),
    (("nonsense",), "No such command"),
    (("generate", "--no-such-option"), "No such option"),
])
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    check_refusal(run_lapwan(*arguments, cwd=tmp_path, environment=WIDE), message)
    assert list(tmp_path.iterdir()) == []


def test_as_a_program_it_refuses_alike(tmp_path):
    check_refusal(program("train-lora", "-o", "x", "--cache", "nowhere", "--steps", "1", cwd=tmp_path),
                  "error: no cache folder nowhere")
    assert list(tmp_path.iterdir()) == []


def check_refusal(ran: Ran, message: str) -> None:
    assert ran.code == 2, ran
    assert message in ran.err
    assert "Traceback" not in ran.err
    if ran.err.startswith("error:"):
        assert ran.err.strip().count("\n") == 0


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_options_of_older_versions_are_accepted(command):
    stored = tomllib.loads((Path(__file__).parent / "released_options.toml").read_text(encoding="utf-8"))
    typed = get_command(app).commands[command.name]
    params = typed.get_params(click.Context(typed))
    accepted = {name for param in params for name in (*param.opts, *param.secondary_opts)}
    released = {*stored["every_command"], *stored[command.name]}
    assert {name for name in released if rewrite([command.name, name])[1] not in accepted} == set()
    assert accepted - released - {"files", "clips"} == set(), "a new option is added to released_options.toml"


def test_older_names_in_a_grid():
    settings = load(GenerateSettings, environment={}, options={
        "model": "tiny", "prompt": "x", "output": "out", "grid": ["reuse=0.05,0.1"]})
    assert [job.settings.first_block_cache for job in make_video_jobs(settings)] == [0.05, 0.1]


def test_older_option_names():
    assert rewrite(["generate", "--lora_moe_weights", "m", "--output_path=o.mp4", "--video_size", "480", "832"]) == [
        "generate", "--moe", "m", "--output=o.mp4", "--size", "480x832"]
    assert rewrite(["generate", "--instrument_hint", "a_b"]) == ["generate", "--instrument-hint", "a_b"]
    assert rewrite(["train-lora", "--set", "optimizer.lr=1"]) == ["train-lora", "--set", "optimizer.lr=1"]
    assert rewrite(["label", "--", "--odd_name"]) == ["label", "--", "--odd_name"]


def test_the_version_is_the_packages(tmp_path):
    assert program("--version", cwd=tmp_path) == (0, f"lapwan {__version__}\n", "")
