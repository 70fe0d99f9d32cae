"""The commands, a row each: name, the settings they take, the module that runs them, and what --help says."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the list of commands is printed without the settings and pydantic
    from lapwan.settings.base import RunOptions, Settings


@dataclass(frozen=True)
class Command:
    """`module` has `run(settings, options)`; it is imported only when the command runs."""

    name: str
    module: str
    settings_module: str
    settings_class: str
    help: str
    example: str

    def settings_model(self) -> type[Settings]:
        """The settings class; importing it imports no torch."""
        model: type[Settings] = getattr(importlib.import_module(self.settings_module), self.settings_class)
        return model

    def run(self, settings: Settings, options: RunOptions) -> None:
        """Run the command; what it needs is imported now."""
        importlib.import_module(self.module).run(settings, options)


def _command(name: str, settings_class: str, help: str, example: str) -> Command:
    module = name.replace("-", "_")
    return Command(name, f"lapwan.commands.{module}", f"lapwan.settings.{module}", settings_class, help, example)


COMMANDS: tuple[Command, ...] = (
    _command("label", "LabelSettings", "Captions to instrument labels, with their distribution and what to mend.",
             "lapwan label clips.jsonl -o labels.jsonl --report report.json"),
    _command("cache", "CacheSettings", "Clips and captions to latents and text features, ready for training.",
             "lapwan cache --dataset labels.jsonl --model tiny -o cache"),
    _command("train-lora", "TrainLoraSettings", "Stage 1: a LoRA for each noise expert, from one run.",
             "lapwan train-lora --cache cache --steps 1000 -o stage1"),
    _command("merge", "MergeSettings", "Merge LoRAs into a model folder, into one transformer, or into one LoRA.",
             "lapwan merge --model MODEL --lora high=A.safetensors --lora low=B.safetensors -o OUT"),
    _command("train-moe", "TrainMoeSettings", "Stage 2: a mixture of instrument LoRA experts with a learned router.",
             "lapwan train-moe --model merged --cache cache --steps 1000 -o stage2"),
    _command("srpo", "SrpoSettings", "Align a noise expert with what reward models prefer, from prompts alone.",
             "lapwan srpo --prompts captions.json --reward hps=HPS_v2.1_compressed.pt --size 512x512 -o aligned"),
    _command("generate", "GenerateSettings", "A prompt (and an image) to a video, through both noise experts.",
             'lapwan generate --model tiny --prompt "电凝钩切割组织" -o out.mp4'),
    _command("evaluate", "EvaluateSettings", "Adapters compared on held-out clips at equal noise, with intervals.",
             "lapwan evaluate --model merged --moe stage2/lapwan.safetensors --clips labels.jsonl -o evaluation"),
    _command("inspect-weights", "InspectWeightsSettings", "Magnitudes, norms, ratios and a verdict of LoRA files.",
             "lapwan inspect-weights run_high_noise.safetensors run_low_noise.safetensors --preset motion"),
    _command("demo", "DemoSettings", "The whole pipeline on the embedded model, with videos, reports and times.",
             "lapwan demo -o lapwan-demo"),
)
