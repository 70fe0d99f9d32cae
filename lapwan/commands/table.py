"""The table of commands: name, settings, the module that runs it, help and example."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # listing the commands must import neither settings nor pydantic
    from lapwan.settings.base import RunOptions, Settings


@dataclass(frozen=True)
class Command:
    """`module` has `run(settings, options)`; it is imported only when the command runs.

    `locks`: it holds the lock of its output folder, and has `--no-lock`.
    """

    name: str
    module: str
    settings_module: str
    settings_class: str
    help: str
    example: str
    locks: bool = False

    def settings_model(self) -> type[Settings]:
        """The settings class; importing it does not import torch."""
        model: type[Settings] = getattr(importlib.import_module(self.settings_module), self.settings_class)
        return model

    def run(self, settings: Settings, options: RunOptions) -> None:
        """Import the command's module and run it."""
        importlib.import_module(self.module).run(settings, options)


def _command(name: str, settings_class: str, help: str, example: str, locks: bool = False) -> Command:
    module = name.replace("-", "_")
    return Command(name, f"lapwan.commands.{module}", f"lapwan.settings.{module}", settings_class, help, example, locks)


COMMANDS: tuple[Command, ...] = (
    _command("split", "SplitSettings", "Split long recordings into windows for training, without re-encoding.",
             "lapwan split recordings/ -o clips.jsonl --every 10 --scenes"),
    _command("label", "LabelSettings", "Label clips with instruments by their captions, and report the distribution.",
             "lapwan label clips.jsonl -o labels.jsonl --report report.json"),
    _command("cache", "CacheSettings", "Encode clips and captions to latents and text features for training.",
             "lapwan cache --dataset labels.jsonl --model tiny -o cache", locks=True),
    _command("train-lora", "TrainLoraSettings", "Stage 1: train a LoRA for each noise expert, in one run.",
             "lapwan train-lora --cache cache --steps 1000 -o stage1", locks=True),
    _command("merge", "MergeSettings", "Merge LoRAs into a model folder, into one transformer, or into one LoRA.",
             "lapwan merge --model MODEL --lora high=A.safetensors --lora low=B.safetensors -o OUT"),
    _command("train-moe", "TrainMoeSettings", "Stage 2: train a mixture of LoRA experts with a learned router.",
             "lapwan train-moe --model merged --cache cache --steps 1000 -o stage2", locks=True),
    _command("srpo", "SrpoSettings", "Align a noise expert with the preferences of reward models, from prompts alone.",
             "lapwan srpo --prompts captions.json --reward hps=HPS_v2.1_compressed.pt --size 512x512 -o aligned",
             locks=True),
    _command("generate", "GenerateSettings", "Generate a video from a prompt, or from a prompt and an image.",
             'lapwan generate --model tiny --prompt "电凝钩切割组织" -o out.mp4'),
    _command("evaluate", "EvaluateSettings", "Compare adapters on held-out clips at equal noise, with intervals.",
             "lapwan evaluate --model merged --moe stage2/lapwan.safetensors --clips labels.jsonl -o evaluation",
             locks=True),
    _command("train-judge", "TrainJudgeSettings",
             "Train a judge of videos for evaluate, on a cache's labels and boxes.",
             "lapwan train-judge --cache cache --model MODEL -o judge.safetensors"),
    _command("inspect-weights", "InspectWeightsSettings", "Print magnitudes, norms, ratios and a verdict for LoRAs.",
             "lapwan inspect-weights run_high_noise.safetensors run_low_noise.safetensors --preset motion"),
    _command("doctor", "DoctorSettings", "Check this machine, and show what of Wan2.2 fits on it.",
             "lapwan doctor --memory 16"),
    _command("demo", "DemoSettings", "Run the whole pipeline on the embedded model, with videos, reports and times.",
             "lapwan demo -o lapwan-demo", locks=True),
)
