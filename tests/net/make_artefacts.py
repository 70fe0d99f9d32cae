"""Make the artefacts with a given tree of lapwan, through its command line.

    PYTHONPATH=TREE python tests/net/make_artefacts.py OUT

The random base, the reward's model, the clips, the settings and the examples are copied from the artefacts where they
are there, else made: files of other random weights would need everything recorded anew.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import net_cases as cases
import random_base

_ENOUGH = 8  # steps, after which a run is interrupted
_ENOUGH_VIDEOS = 5


def main(out: Path) -> None:
    """Everything, in order: later artefacts rest on earlier ones."""
    out.mkdir(parents=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "160"}
    os.chdir(out)
    _sources()
    expected = Path("expected")
    expected.mkdir(exist_ok=True)
    losses = {name: _whole_run(name) for name in cases.RUNS}
    _write_json(expected / "losses.json", losses)
    for name in cases.STOPPED:
        _interrupted_run(name)
    _adapters(expected)
    _latents()
    _lapwan(*cases.LATENTS["hint"], "-o", "videos/hook.mp4")
    for name, words in cases.INSPECTED.items():
        _lapwan("inspect-weights", *words, "--json", str(expected / f"inspect_{name}.json"))
    _evaluation(expected)
    _tidy(Path())


def _lapwan(*words: str) -> None:
    sys.stderr.write(f"lapwan {' '.join(words)}\n")
    subprocess.run([sys.executable, "-m", "lapwan", *words], check=True, capture_output=True, text=True)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _sources() -> None:
    """The random base, the reward's model, the clips with labels, and their cache."""
    for name, write in (("base", random_base.write_base), ("clip_model", random_base.write_clip_model),
                        ("clips", random_base.write_clips)):
        if (cases.ARTEFACTS / name).is_dir():
            shutil.copytree(cases.ARTEFACTS / name, name, ignore=shutil.ignore_patterns("labels.*"))
        else:
            write(Path(name))
    for name in ("settings", cases.EXAMPLES):
        shutil.copytree(cases.ARTEFACTS / name, name)
    cases.set_clip_times(Path())
    _lapwan("label", "clips/clips.jsonl", "-o", "clips/labels.jsonl")
    _lapwan("cache", "--dataset", "clips/labels.jsonl", "--model", "base", "-o", "cache", "--workers", "0",
            "--device", "cpu")


def _whole_run(name: str) -> dict[str, list[float]]:
    run = Path("whole") / name
    _lapwan(*cases.RUNS[name], "-o", str(run))
    for own, folder in (("train_lora", "stage1"), ("train_moe", "stage2"), ("train_moe_base_lora", "stage2_base_lora")):
        if name == own:
            Path(folder).mkdir()
            for path in run.glob("*.safetensors"):
                shutil.copy(path, folder)
    return cases.figures_of_steps(run)


def _interrupted_run(name: str) -> None:
    run = Path("runs") / name
    metrics = run / "metrics.jsonl"
    _interrupt((*cases.RUNS[name], "-o", str(run)),
               lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") >= _ENOUGH)
    shutil.rmtree(run / "tensorboard")


def _interrupt(words: tuple[str, ...], enough: Callable[[], bool]) -> None:
    """Ctrl-C as soon as `enough`; it must come before the end."""
    sys.stderr.write(f"lapwan {' '.join(words)} ... Ctrl-C\n")
    command = [sys.executable, "-m", "lapwan", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not enough() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    if process.returncode != 130:
        raise SystemExit(f"lapwan {words} ended with {process.returncode}, not interrupted:\n{said}")


def _adapters(expected: Path) -> None:
    """Stage 1 in each layout and in one file, with ΔW; a mixture at one mix."""
    for layout in cases.LORAS:
        _lapwan("merge", *cases.STAGE1, "--format", layout, "-o", f"loras/{layout}.safetensors")
    _lapwan("merge", *cases.STAGE1, "--one-file", "-o", "loras/one_file.safetensors")
    deltas = {side: cases.fingerprints(Path(f"stage1/lapwan_{side}_noise.safetensors")) for side in ("high", "low")}
    _write_json(expected / "delta_w.json", deltas)
    mixes = {}
    for name in ("stage2", "stage2_base_lora"):
        _lapwan("merge", "--moe", f"{name}/lapwan.safetensors", "--mix", cases.MIX, "-o", f"whole/{name}.safetensors")
        mixes[name] = {side: cases.fingerprints(Path(f"whole/{name}_{side}_noise.safetensors"))
                       for side in ("high", "low")}
    _write_json(expected / "mix_delta_w.json", mixes)


def _latents() -> None:
    for name, words in cases.LATENTS.items():
        _lapwan(*words, "-o", f"latents/{name}.safetensors")


def _evaluation(expected: Path) -> None:
    """The figures of a whole evaluation, and a folder that was interrupted after some videos."""
    words = ("evaluate", "--config", "settings/evaluate.toml", "-o")
    _lapwan(*words, "whole/evaluation")
    shutil.copy("whole/evaluation/evaluation.json", expected)
    videos = Path("evaluation/videos")
    _interrupt((*words, "evaluation"), lambda: len(list(videos.glob("*/*.json"))) >= _ENOUGH_VIDEOS)


def _tidy(folder: Path) -> None:
    """Drop what is not kept; the folder's own path becomes a mark."""
    shutil.rmtree(folder / "whole")
    for lock in folder.rglob(".lapwan*.lock"):  # of the commands that were killed
        lock.unlink()
    for path in cases.text_files(folder):
        text = path.read_text(encoding="utf-8")
        if (own := str(Path.cwd())) in text:
            path.write_text(text.replace(own, cases.ROOT_MARK), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
