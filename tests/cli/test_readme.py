"""Every command that the README shows is run as it stands, on few clips and few steps."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from command_line import Ran, run_successfully

from lapwan.commands.table import COMMANDS
from lapwan.settings.generate import GenerateSettings
from lapwan.settings.load import load
from lapwan.tiny.dataset import write_dataset

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
SMALL = {
    "cache": {"--size": "32x32", "--num-frames": "5"},
    "generate": {"--size": "32x32", "--num-frames": "5", "--steps": "3"},
    "evaluate": {"--count": "1", "--steps": "2"},
}
# What the Chinese section leaves to the reader.
PLACES = {
    "模型目录": "tiny", "clips.jsonl": "clips/clips.jsonl", "high=…": "high=stage1/lapwan_high_noise.safetensors",
    "low=…": "low=stage1/lapwan_low_noise.safetensors",
}


def block(title: str, language: str) -> str:
    """The first code block of a language in a section."""
    found = re.search(rf"```{language}\n(.*?)```", TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0], re.DOTALL)
    assert found is not None
    return found[1]


def shown(title: str) -> list[list[str]]:
    """The `lapwan ...` lines of a section's shell block, as words."""
    lines = block(title, "bash").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("lapwan ")]


def inline() -> list[list[str]]:
    """The commands in running text; not `lapwan COMMAND --help` and a bare name."""
    commands = re.findall(r"(?<!`)`(?:accelerate launch -m )?(lapwan [^`]+)`", TEXT)
    found = [shlex.split(command)[1:] for command in commands]
    return [words for words in found if words[0] in {command.name for command in COMMANDS} and len(words) > 1]


def run(words: list[str], folder: Path) -> Ran:
    return run_successfully(*words, cwd=folder, stdin="电凝钩切割组织\n")


def small(words: list[str]) -> list[str]:
    """The same with few steps, and a small size where none is said; a repetition takes its own."""
    words = ["2" if before == "--steps" else word for before, word in zip(["", *words], words, strict=False)]
    if "--from" in words:
        return words
    more = {option: value for option, value in SMALL.get(words[0], {}).items() if option not in words}
    return words + [word for pair in more.items() for word in pair]


@pytest.fixture(scope="module")
def toured(tmp_path_factory) -> Path:
    """The folder that the tour leaves behind."""
    folder = tmp_path_factory.mktemp("tour")
    write_dataset(folder / "clips", clips=8, seed=1, size=(64, 64), frames=17, test_share=0.5)
    (folder / "examples").symlink_to(README.parent / "examples")
    for words in shown("A tour"):
        run(small(words), folder)
    return folder


def test_the_tour_runs_as_it_stands(toured) -> None:
    assert [words[0] for words in shown("A tour")] == [
        "label", "cache", "train-lora", "inspect-weights", "merge", "train-moe", "generate", "generate",
        "evaluate"]
    assert (toured / "hook.mp4").stat().st_size > 0 and (toured / "suction.mp4").stat().st_size > 0
    assert (toured / "merged" / "model_index.json").is_file()
    assert (toured / "evaluation" / "evaluation.json").is_file()


def test_generating_runs_as_it_stands(toured) -> None:
    said = {}
    for words in shown("Generating"):
        said[words[-1]] = run(small(words), toured).err
    assert "the frames are identical to those of hook.mp4" in said["again.mp4"], said["again.mp4"]
    names = ["first.png", "from_image.mp4", "loras.mp4", "dpmpp.mp4", "videos/sheet.png", "videos/grasper.mp4",
             "alphas_grid.mp4", "alphas_sheet.png", "again.mp4", "restyled.mp4", "session/001.mp4"]
    assert [name for name in names if not (toured / name).is_file()] == []


def test_the_python_runs_as_it_stands(toured) -> None:
    printed = io.StringIO()
    with contextlib.chdir(toured), contextlib.redirect_stdout(printed):
        exec(compile(block("Generating", "python"), str(README), "exec"), {"__name__": "__main__"})
    lines = printed.getvalue().splitlines()
    assert lines[0].startswith("(5, 96, 96, 3) ") and "must be 4N+1" in lines[1], lines
    assert lines[2] == "(0.0, 0.0, 0.0, 1.0)" and lines[3] in ("good", "warn", "stop") and len(lines) == 4, lines
    assert (toured / "python.mp4").is_file() and (toured / "both.safetensors").is_file()


def test_the_separate_files_are_understood() -> None:
    settings = load(GenerateSettings, options=tomllib.loads(block("Generating", "toml")), environment={})
    assert settings.model.vae == Path("Wan2.2-T2V-A14B/Wan2.1_VAE.pth") and settings.model.transformer is None


def test_the_commands_in_the_text_pass_their_checks(toured) -> None:
    """They are the tour's again, or take an example's settings: `--dry-run` checks all but the work."""
    (toured / "clips" / "labels.jsonl").write_bytes((toured / "labels.jsonl").read_bytes())
    commands = inline()
    assert {words[0] for words in commands} == {
        "label", "cache", "train-lora", "merge", "train-moe", "generate", "evaluate"}
    for words in commands:
        words = [PLACES.get(word, word) for word in words]
        run([*words, "--dry-run", "--overwrite"], toured)


def test_the_readme_holds_the_two_commands_that_ci_runs():
    ci = (README.parent / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install -e '.[dev]' && pytest\n" in TEXT and "pip install -e '.[dev]' && pytest\n" in ci
    assert "pip install . && lapwan demo\n" in TEXT and "pip install . && lapwan demo" in ci
