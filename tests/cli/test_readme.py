"""The commands of README and of the guides in examples/ are run as they are printed, on few clips.

A block marked `bash` is run, made small by environment variables (which a command's options and --set override). One
marked `bash gpu` needs a GPU, several processes or the 14B model: its lines are run with --dry-run, on the embedded
model under the name of the 14B model's folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import click
import pytest
from command_line import Ran, run_successfully
from typer.main import get_command

from lapwan.cli import app
from lapwan.commands.table import COMMANDS
from lapwan.models.spec import ModelSpec
from lapwan.settings.generate import GenerateSettings
from lapwan.settings.load import load
from lapwan.tiny.dataset import write_dataset
from lapwan.tiny.model import tiny_folder

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "examples").glob("*.md"))
PAGES = [README, *GUIDES, ROOT / "examples" / "comparison" / "README.md"]
BIG_MODEL, TI2V = "Wan2.2-T2V-A14B-Diffusers", "Wan2.2-TI2V-5B-Diffusers"
SMALL = {
    "LAPWAN_STEPS": "3", "LAPWAN_SIZE": "32x32", "LAPWAN_NUM_FRAMES": "5", "LAPWAN_PREVIEW__STEPS": "2",
    "LAPWAN_ACCUMULATE": "1", "LAPWAN_BATCH_SIZE": "1", "LAPWAN_ROLLOUT__STEPS": "2",
    "LAPWAN_VIDEOS__COUNT": "1", "LAPWAN_VIDEOS__SEEDS": "1", "LAPWAN_VIDEOS__STEPS": "2",
    "LAPWAN_VIDEOS__SIZE": "32x32", "LAPWAN_VIDEOS__NUM_FRAMES": "5", "LAPWAN_INTERVAL__SAMPLES": "100",
}
# Names that stand for the reader's own files, and a reward whose weights are not here.
LEFT_OPEN = {
    "hps=HPS_v2.1_compressed.pt": "tiny", "模型目录": "tiny", "clips.jsonl": "clips/clips.jsonl",
    "high=…": "high=stage1/lapwan_high_noise.safetensors", "low=…": "low=stage1/lapwan_low_noise.safetensors",
    "MODEL": "tiny", "prompts.jsonl": "examples/prompts.jsonl",
    "A.safetensors:0.5": "stage1/lapwan_high_noise.safetensors:0.5",
}
OTHER_PROGRAMS = {"--local-dir", "--nproc-per-node", "--processes", "--minutes"}


def blocks(page: Path, info: str) -> list[str]:
    """The code blocks whose fence says `info`."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{info}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: Path, info: str) -> list[list[str]]:
    """The `lapwan ...` lines of those blocks as words, without the program that starts several processes."""
    lines = [shlex.split(line, comments=True) for block in blocks(page, info) for line in block.splitlines()]
    return [words[words.index("lapwan") + 1:] for words in lines if "lapwan" in words]


def inline(page: Path) -> list[list[str]]:
    """The commands in running text that are more than a name."""
    found = re.findall(r"(?<!`)`lapwan ([^`]+)`", page.read_text(encoding="utf-8"))
    names = {command.name for command in COMMANDS}
    return [words for words in map(shlex.split, found) if words[0] in names and len(words) > 1]


def run(words: list[str], folder: Path) -> Ran:
    small = {} if "--dry-run" in words else SMALL
    return run_successfully(*words, cwd=folder, stdin="电凝钩切割组织\n", environment=small)


def follow(page: Path, folder: Path) -> dict[str, Ran]:
    """Run a page's commands in order, those for a GPU with --dry-run; what each printed, by its last word."""
    ran = {words[-1]: run(words, folder) for words in commands(page, "bash")}
    for words in commands(page, "bash gpu"):
        check(words, folder)
    return ran


def check(words: list[str], folder: Path) -> None:
    """Run a command with --dry-run."""
    run([*(LEFT_OPEN.get(word, word) for word in words), "--dry-run", "--overwrite"], folder)


@pytest.fixture(scope="module")
def surgical(tmp_path_factory: pytest.TempPathFactory, ti2v: ModelSpec) -> Path:
    """The folder that the guide to surgical video leaves behind; the other guides begin with it."""
    folder = tmp_path_factory.mktemp("surgical")
    write_dataset(folder / "clips", clips=8, seed=1, size=(64, 64), frames=17, test_share=0.5)
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / BIG_MODEL).symlink_to(tiny_folder("t2v"))
    (folder / TI2V).symlink_to(ti2v.path)
    (folder / "captions.json").write_text(json.dumps([{"caption": f"抓钳抓取组织 {i}"} for i in range(20)]), "utf-8")
    follow(ROOT / "examples" / "surgical.md", folder)
    return folder


@pytest.fixture
def beginning(surgical: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(surgical, tmp_path / "guide", symlinks=True, copy_function=os.link)


def test_surgical(surgical: Path) -> None:
    names = [words[0] for words in commands(ROOT / "examples" / "surgical.md", "bash")]
    assert names == ["label", "cache", "train-lora", "inspect-weights", "merge", "train-moe", "inspect-weights",
                     "generate", "generate", "evaluate"]
    for name in ("hook.mp4", "suction.mp4", "merged/model_index.json", "evaluation/evaluation.json"):
        assert (surgical / name).stat().st_size > 0


@pytest.mark.parametrize(("name", "files"), [
    ("alignment", ["aligned/lapwan_low_noise.safetensors", "aligned.mp4"]),
    ("files", ["high_musubi.safetensors", "low_diffusers.safetensors", "two_low_noise.safetensors",
               "sum_rank4.safetensors", "slider_high.safetensors", "averaged_low_noise.safetensors", "kept.png",
               "extracted_low_noise.safetensors", "strengths/sheet.png", "merged_again/model_index.json"]),
    ("generating", ["first.png", "from_image.mp4", "videos/sheet.png", "alphas_grid.mp4", "session/001.mp4"]),
    ("judge", []),
    ("motion", ["motion/motion_low_noise.safetensors", "motion.png", "motion.json", "motion.mp4"]),
    ("several_gpus", []),
    ("small_cards", ["runs/small_card/lapwan_high_noise.safetensors", "streamed.mp4"]),
])
def test_the_guide(name: str, files: list[str], beginning: Path) -> None:
    ran = follow(ROOT / "examples" / f"{name}.md", beginning)
    assert [file for file in files if not (beginning / file).is_file()] == []
    if name == "generating":
        assert "the frames are identical to those of loras.mp4" in ran["again.mp4"].err, ran["again.mp4"].err


def test_every_guide_is_tested_and_is_in_the_readme() -> None:
    tested = {"surgical", *(mark.args[1][i][0] for mark in test_the_guide.pytestmark for i in range(len(mark.args[1])))}
    assert tested == {guide.stem for guide in GUIDES}
    text = README.read_text(encoding="utf-8")
    assert [guide.name for guide in GUIDES if f"(examples/{guide.name})" not in text] == []


def test_the_quick_start_and_the_commands_in_the_text_pass_their_checks(beginning: Path) -> None:
    quick_start = commands(README, "bash")
    assert [words[0] for words in quick_start] == ["demo", "cache", "train-lora", "train-lora", "generate", "demo"]
    (beginning / "run").symlink_to("stage1")
    (beginning / "labels.jsonl").symlink_to("clips/labels.jsonl")
    in_text = inline(README)
    assert {words[0] for words in in_text} >= {"label", "cache", "train-lora", "merge", "train-moe", "generate"}
    for words in [*quick_start, *in_text]:
        if words[0] == "demo" or words == ["train-lora", "--preset", "motion"]:
            continue  # the tests' longest command; an option named in the table
        check(words, beginning)


def test_the_readmes_python_runs(beginning: Path) -> None:
    printed = io.StringIO()
    with contextlib.chdir(beginning), contextlib.redirect_stdout(printed):
        exec(compile(blocks(README, "python")[0], str(README), "exec"), {"__name__": "__main__"})
    lines = printed.getvalue().splitlines()
    assert lines[0].startswith("(5, 96, 96, 3) ") and lines[1] == "(0.0, 0.0, 0.0, 1.0)", lines
    assert lines[2] in ("good", "warn", "stop") and len(lines) == 3, lines
    assert (beginning / "python.mp4").is_file() and (beginning / "half.safetensors").is_file()


def test_the_python_of_the_guide_to_generating_runs(beginning: Path) -> None:
    with contextlib.chdir(beginning), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(blocks(ROOT / "examples" / "generating.md", "python")[0], "generating.md", "exec"), {})
    assert printed.getvalue().split() == ["2", "4", "4", "4"] and len(list(beginning.glob("many_*.mp4"))) == 2


def test_the_separate_files_are_understood() -> None:
    block = blocks(ROOT / "examples" / "files.md", "toml")[0]
    settings = load(GenerateSettings, options=tomllib.loads(block), environment={})
    assert settings.model.vae == Path("Wan2.2-T2V-A14B/Wan2.1_VAE.pth") and settings.model.transformer is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere_and_options_exist(page: Path, known_options: set[str]) -> None:
    text = page.read_text(encoding="utf-8")
    links = [*re.findall(r"\]\(([^)#]+)\)", text), *re.findall(r'src="([^"]+)"', text)]
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
    inline_code = " ".join(re.findall(r"`([^`]+)`", text))
    options = set(re.findall(r"(?<!\S)--[a-z][\w-]*", inline_code))
    assert options - known_options - OTHER_PROGRAMS == set()


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    """The options of all commands."""
    known = {"--help", "--version", "--install-completion"}
    for command in get_command(app).commands.values():
        for parameter in command.get_params(click.Context(command)):
            known |= {*parameter.opts, *parameter.secondary_opts}
    return known


def test_the_readme_is_short_and_holds_the_two_commands_that_ci_runs() -> None:
    text = README.read_text(encoding="utf-8")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    assert "pip install -e '.[dev]' && pytest\n" in text and "pip install -e '.[dev]' && pytest\n" in ci
    assert "pip install . && lapwan demo\n" in text and "pip install . && lapwan demo" in ci
