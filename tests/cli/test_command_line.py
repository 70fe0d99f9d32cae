"""The command line as users type it: help, exit codes, older names of options, examples.

Few tests start a process of its own, since each pays for imports; what `python -m lapwan` adds is held by those.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import tomllib
from contextlib import suppress
from pathlib import Path

import click
import pytest
from adapter_cases import write_random_lora, write_random_mixture
from command_line import Ran, run_lapwan, run_successfully
from rich.cells import cell_len
from typer.main import get_command

from lapwan import __version__
from lapwan.cli import app
from lapwan.cli_aliases import rewrite
from lapwan.commands.table import COMMANDS
from lapwan.lora.assign import LoraRequest, assign
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


def on_terminal(*arguments: str, cwd: Path) -> str:
    """What a terminal of 80 columns shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen([sys.executable, "-m", "lapwan", *arguments], cwd=cwd, stdin=theirs, stdout=theirs,
                               stderr=theirs, env={**environment, "TERM": "xterm", "NO_COLOR": "1"})
    os.close(theirs)
    shown = bytearray()
    with suppress(OSError):  # EIO: the other end is closed
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    assert process.wait(timeout=120) == 0, shown.decode()
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).replace("\r\n", "\n")


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
    lines = done.err.splitlines()
    assert lines[-1].startswith("dry run: ")
    assert len(lines) <= (16 if example.name not in LONG else 26), done.err
    assert all(cell_len(line) <= 100 for line in lines), done.err


LONG = {"evaluate.toml", "motion.toml", "sequential.toml", "stage2.toml"}


@pytest.mark.parametrize("name", ["motion.toml", "stage2.toml"])
def test_a_dry_run_has_all_settings_in_a_pipe_and_all_checks_with_v(name, example_inputs):
    example = EXAMPLES[0].with_name(name)
    command = re.search(r"lapwan (\S+) --config", example.read_text(encoding="utf-8"))
    arguments = (command[1], "--config", example, "--dry-run", "--overwrite")
    short, whole = (run_successfully(*arguments, *more, cwd=example_inputs) for more in ((), ("-v",)))
    assert short.out == whole.out
    resolved = tomllib.loads(short.out)
    assert resolved["seed"] == 42 and resolved["optimizer"]["weight_decay"] > 0
    assert "check ok" not in short.err and "#####" not in short.err
    passed, total = map(int, re.search(r"checks +(\d+) of (\d+) passed", short.err).groups())
    assert whole.err.count("check ok") == passed and short.err.count("\nwarning: ") == total - passed > 0
    assert ("#####" in whole.err) is (name == "motion.toml")  # uniform, there is no histogram to show


@pytest.mark.parametrize("command", ["train-lora", "cache"])
def test_on_a_terminal_a_dry_run_prints_what_differs_from_the_defaults(command, example_inputs):
    example = {"train-lora": "stage1.toml", "cache": "cache.toml"}[command]
    arguments = [command, "--config", str(EXAMPLES[0].with_name(example)), "--dry-run", "--overwrite"]
    short, whole = (on_terminal(*arguments, *more, cwd=example_inputs) for more in ((), ("-v",)))
    assert "-v prints all settings" in short and "device = " not in short
    assert 'device = "auto"' in whole
    for line in short.splitlines():
        assert cell_len(line) <= 80, line
    assert len(short.splitlines()) <= 25
    assert ("save_every = 250" if command == "train-lora" else "num_frames = [17]") in short


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
    merged = assign([LoraRequest(noise_expert, Path(path), 1.0) for noise_expert, path in loras], tuple(NoiseExpert))
    write_random_mixture(folder / "stage2" / "lapwan.safetensors", Base(read_spec(tiny_folder("t2v")), merged))
    return folder


@pytest.mark.parametrize(("arguments", "message"), [
    (("train-lora", "-o", "x", "--cache", "nowhere", "--steps", "1"), "error: no cache folder nowhere"),
    (("train-lora", "-o", "x", "--steps", "1"), "'data' is required"),
    (("train-lora", "-o", "x", "--cache", "c", "--steps", "none"), "error: --steps: steps = 'none'"),
    (("train-moe", "--config", "no.toml"), "error: no such file: no.toml"),
    (("nonsense",), "error: lapwan: no such command 'nonsense'"),
    (("generate", "--stepz", "3"), "error: lapwan generate: no option '--stepz' (did you mean '--steps'?)"),
    (("doctor", "-z"), "error: lapwan doctor: no option '-z'"),
    (("merge", "--rank"), "error: lapwan merge: option '--rank' requires an argument"),
    (("cache", "extra"), "error: lapwan cache: got unexpected extra argument"),
    (("label", "--strict=3"), "error: lapwan label: option '--strict' does not take a value"),
    (("--versoin",), "error: lapwan: no option '--versoin' (did you mean '--version'?)"),
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
    assert ran.err.startswith("error: ")
    assert ran.err.strip().count("\n") == 0


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_options_of_older_versions_are_accepted(command):
    stored = tomllib.loads((Path(__file__).parent / "released_options.toml").read_text(encoding="utf-8"))
    typed = get_command(app).commands[command.name]
    params = typed.get_params(click.Context(typed))
    accepted = {name for param in params for name in (*param.opts, *param.secondary_opts)}
    released = {*stored["every_command"], *stored[command.name]}
    assert {name for name in released if rewrite([command.name, name])[1] not in accepted} == set()
    new = accepted - released - {"files", "clips", "recordings"}
    assert new == set(), "a new option is added to released_options.toml"


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
