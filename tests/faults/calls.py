"""One usual call of every command on the stored artefacts, the files that it reads, and the kinds of bad input there.

How to add a call: a row of `CALLS`; its kinds of bad input follow from the formats of its files.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1] / "net"))

import mutations
from mutations import CANARY, DAMAGES, Damage
from net_cases import copy_artefacts

WORK, OUTSIDE = "work", "outside"
BASE = ("--model", "base", "--device", "cpu")
LORAS = ("--lora", "high=stage1/lapwan_high_noise.safetensors", "--lora", "low=stage1/lapwan_low_noise.safetensors")
HIGH, LOW = "stage1/lapwan_high_noise.safetensors", "stage1/lapwan_low_noise.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
COMMANDS = ("split", "label", "cache", "train-lora", "train-moe", "srpo", "merge", "generate", "evaluate",
            "train-judge", "inspect-weights", "demo", "doctor")


@dataclass(frozen=True)
class Call:
    """A command that succeeds.

    Args:
        files: which files it reads: path in the artefacts -> formats of `mutations`.
        output: what it writes; several for a pair of files.
        folder: whether the output is a folder, in which it may leave finished parts when it fails.
    """

    name: str
    arguments: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)
    output: tuple[str, ...] = ()
    folder: bool = False
    prepare: Callable[[Path], None] | None = None

    @property
    def command(self) -> str:
        """The subcommand."""
        return self.arguments[0]


SAFE = "safetensors"
MODEL_FILES = {
    "base/model_index.json": "json", "base/transformer/config.json": "json", "base/lapwan.json": "json",
    "base/scheduler/scheduler_config.json": "json", f"base/transformer/{WEIGHTS}": f"{SAFE} weights shards",
}
ENCODER_FILES = {
    "base/vae/config.json": "json", f"base/vae/{WEIGHTS}": f"{SAFE} weights",
    "base/text_encoder/config.json": "json", "base/text_encoder/model.safetensors": f"{SAFE} weights",
    "base/tokenizer/tokenizer.json": "json", "base/tokenizer/tokenizer_config.json": "json",
}
CACHE_FILES = {
    "cache/lapwan_index.jsonl": "jsonl index",
    "cache/clip0_00000-005_0080x0064_wan.safetensors": f"{SAFE} cached",
    "cache/clip1_wan_te.safetensors": f"{SAFE} cached",
    "cache/clip0_00000-005_0080x0064_lapwan_roi.safetensors": f"{SAFE} cached",
    "cache/lapwan_prompts.safetensors": f"{SAFE} cached",
}


def run_files(name: str) -> dict[str, str]:
    """What `--resume` reads of a run."""
    state = f"runs/{name}/step_000008/state"
    return {f"runs/{name}/settings.toml": "toml", f"runs/{name}/metrics.jsonl": "metrics",
            f"{state}/rest.pt": "pickle rest", f"{state}/trained.safetensors": f"{SAFE} state"}


def write_inputs(folder: Path) -> None:
    """Inputs that the artefacts lack: taxonomy, musubi dataset, prompts, a fine-tuned transformer, settings."""
    import lapwan

    shutil.copyfile(Path(lapwan.__file__).with_name("data") / "taxonomies" / "surgical4.toml", folder / "taxonomy.toml")
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(mutations.png(64, 64, 64))
    (folder / "images" / "a.txt").write_text("剪刀", encoding="utf-8")
    (folder / "images" / "b.png").write_bytes(mutations.png(80, 64, 64))
    (folder / "images" / "b.txt").write_text("电凝钩", encoding="utf-8")
    (folder / "dataset.toml").write_text(
        "[general]\nresolution = [32, 48]\ncaption_extension = \".txt\"\nbatch_size = 1\n\n[[datasets]]\n"
        'image_directory = "images"\n\n[[datasets]]\nvideo_jsonl_file = "clips/clips.jsonl"\ntarget_frames = [5]\n'
        'frame_extraction = "head"\n', encoding="utf-8")
    (folder / "prompts.yaml").write_text("prompts:\n- 剪刀剪断\n- caption: 电凝钩\n- 吸引\n- 钳\n", encoding="utf-8")
    (folder / "prompts.json").write_text('[{"caption": "剪刀"}, "吸引", "钩", "钳"]', encoding="utf-8")
    (folder / "prompts.txt").write_text("剪刀\n吸引\n钩\n钳\n", encoding="utf-8")
    (folder / "prompts.jsonl").write_text('{"prompt": "剪刀", "seed": 1}\n{"prompt": "吸引", "seed": 2}\n',
                                          encoding="utf-8")
    shutil.copytree(folder / "base/transformer_2", folder / "tuned/transformer")
    _write_judge_inputs(folder)
    for name, text in CONFIGS.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    shutil.copytree(folder / "runs/train_lora/step_000008", folder / "runs/train_lora/step_000012")


def _write_judge_inputs(folder: Path) -> None:
    """A cache whose clips without boxes show no instrument, and a judge of a step or two."""
    from lapwan.commands.train_judge import run
    from lapwan.settings.base import RunOptions
    from lapwan.settings.train_judge import TrainJudgeSettings

    shutil.copytree(folder / "cache", folder / "judge_cache")
    index = folder / "judge_cache" / "lapwan_index.jsonl"
    head, *rows = [json.loads(line) for line in index.read_text("utf-8").splitlines()]
    for row in rows:
        if row.get("roi") is None:
            row.pop("label", None)
            row.pop("label_weights", None)
    index.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (head, *rows)), encoding="utf-8")
    settings = TrainJudgeSettings(cache=folder / "judge_cache", model=str(folder / "base"), unlabelled="none", steps=2,
                                  batch_size=8, device="cpu", output=folder / "judge.safetensors")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run(settings, RunOptions())


CONFIGS = {
    "split": 'recordings = ["clips/clip0.mp4"]\noutput = "out.jsonl"\nseconds = 0.2\nkeep_still = true\n',
    "label": 'clips = "clips/clips.jsonl"\noutput = "out.jsonl"\ntaxonomy = "taxonomy.toml"\nsoft_labels = true\n',
    "cache_settings": 'dataset = "clips/labels.jsonl"\nmodel = "base"\noutput = "out"\nsize = [48, 32]\n'
                      'num_frames = [5]\ndevice = "cpu"\nworkers = 0\n',
    "merge": f'dit = "base/transformer/{WEIGHTS}"\nlora = ["high={HIGH}"]\noutput = "out.safetensors"\n',
    "generate": 'model = "base"\nprompt = "吸引"\nsteps = 1\ndevice = "cpu"\noutput = "out.mp4"\nsize = [48, 32]\n'
                f'lora = ["high={HIGH}", "low={LOW}"]\nnum_frames = 5\n',
    "inspect": f'files = ["{HIGH}", "{LOW}"]\npreset = "motion"\njson_file = "out.json"\n',
    "demo": 'output = "out"\nclips = 8\nsteps = 1\nprompts = 2\n',
    "doctor": 'folder = "cache"\nas_json = true\n',
}
_MERGE = ("merge", "-o")
_CACHE = ("--size", "48x32", "--num-frames", "5", "--workers", "0", "-o", "out")
_GENERATE = ("--steps", "1", "--size", "48x32", "--num-frames", "5", "-o", "out.mp4")
JUDGE = ("train-judge", "--cache", "judge_cache", *BASE, "--unlabelled", "none", "--set", "batch_size=8")
_TINY = ("generate", "--model", "tiny-i2v", "--device", "cpu", "--prompt", "吸引", "--steps", "1", "--size", "32x32",
         "--num-frames", "5", "-o", "out.mp4", "--image")

CALLS: tuple[Call, ...] = (
    Call("split", ("split", "clips/clip0.mp4", "-o", "out.jsonl", "--seconds", "0.2", "--scenes", "--caption", "剪刀"),
         {"clips/clip0.mp4": "video"}, ("out.jsonl",)),
    Call("split --config", ("split", "--config", "split.toml"), {"split.toml": "toml"}, ("out.jsonl",)),
    Call("label", ("label", "clips/clips.jsonl", "-o", "out.jsonl", "--taxonomy", "taxonomy.toml", "--report",
                   "report.json"),
         {"clips/clips.jsonl": "jsonl clips", "taxonomy.toml": "toml"}, ("out.jsonl", "report.json")),
    Call("label --config", ("label", "--config", "label.toml"), {"label.toml": "toml"}, ("out.jsonl",)),
    Call("cache", ("cache", "--dataset", "clips/labels.jsonl", *BASE, *_CACHE),
         {"clips/labels.jsonl": "jsonl clips media", "clips/clip0.mp4": "video", **MODEL_FILES, **ENCODER_FILES},
         ("out",), True),
    Call("cache --config", ("cache", "--config", "cache_settings.toml"), {"cache_settings.toml": "toml"}, ("out",),
         True),
    Call("cache musubi", ("cache", "--dataset", "dataset.toml", *BASE, "--workers", "0", "-o", "out"),
         {"dataset.toml": "toml", "images/a.png": "image", "clips/clip0.mp4": "video",
          "clips/clips.jsonl": "jsonl clips"}, ("out",), True),
    Call("cache again", ("cache", "--config", "cache/lapwan_settings.toml"),
         {"cache/lapwan_settings.toml": "toml"}, ("cache",), True),
    Call("train-lora", ("train-lora", "--config", "settings/train_lora.toml", "--set", "steps=1", "-o", "out",
                        "--set", f"init_lora.high={HIGH}", "--set", f"init_lora.low={LOW}", "--set",
                        "targets.q=4"),
         {"settings/train_lora.toml": "toml", HIGH: f"{SAFE} lora", **CACHE_FILES, **MODEL_FILES}, ("out",), True),
    Call("train-lora --resume", ("train-lora", "--config", "runs/train_lora/settings.toml", "--resume"),
         run_files("train_lora"), ("runs/train_lora",), True,
         lambda folder: shutil.rmtree(folder / "runs/train_lora/step_000012")),
    Call("train-moe", ("train-moe", "--config", "settings/train_moe.toml", "--set", "steps=1", "-o", "out",
                       "--set", "taxonomy=taxonomy.toml"),
         {"settings/train_moe.toml": "toml", "taxonomy.toml": "toml", LOW: f"{SAFE} lora",
          "cache/lapwan_index.jsonl": "jsonl index"}, ("out",), True),
    Call("train-moe --resume", ("train-moe", "--config", "runs/train_moe/settings.toml", "--resume"),
         run_files("train_moe"), ("runs/train_moe",), True),
    Call("srpo", ("srpo", "--config", "settings/srpo.toml", "--set", "steps=1", "-o", "out"),
         {"settings/srpo.toml": "toml", "clips/clips.jsonl": "jsonl clips", "clip_model/config.json": "json",
          "clip_model/model.safetensors": f"{SAFE} weights", "clip_model/tokenizer.json": "json"}, ("out",), True),
    Call("srpo yaml", ("srpo", "--config", "settings/srpo.toml", "--set", "steps=1", "-o", "out", "--prompts",
                       "prompts.yaml"), {"prompts.yaml": "yaml"}, ("out",), True),
    Call("srpo json", ("srpo", "--config", "settings/srpo.toml", "--set", "steps=1", "-o", "out", "--prompts",
                       "prompts.json"), {"prompts.json": "json"}, ("out",), True),
    Call("srpo text", ("srpo", "--config", "settings/srpo.toml", "--set", "steps=1", "-o", "out", "--prompts",
                       "prompts.txt"), {"prompts.txt": "text"}, ("out",), True),
    Call("srpo --resume", ("srpo", "--config", "runs/srpo/settings.toml", "--resume"),
         run_files("srpo"), ("runs/srpo",), True),
    Call("merge --model", (*_MERGE, "out", "--model", "base", *LORAS),
         {HIGH: f"{SAFE} lora", **MODEL_FILES}, ("out",)),
    Call("merge --dit", (*_MERGE, "out.safetensors", "--dit", f"base/transformer/{WEIGHTS}", "--lora", f"high={HIGH}"),
         {HIGH: f"{SAFE} lora", f"base/transformer/{WEIGHTS}": f"{SAFE} weights"}, ("out.safetensors",)),
    Call("merge --config", ("merge", "--config", "merge.toml"), {"merge.toml": "toml"}, ("out.safetensors",)),
    Call("merge --lora", (*_MERGE, "out.safetensors", "--lora", "loras/comfy_high_noise.safetensors:0.5", "--lora",
                          "loras/musubi_high_noise.safetensors", "--rank", "4"),
         {"loras/comfy_high_noise.safetensors": f"{SAFE} lora", "loras/musubi_high_noise.safetensors": SAFE},
         ("out.safetensors",)),
    Call("merge --moe", (*_MERGE, "out.safetensors", "--moe", "stage2/lapwan.safetensors", "--mix", "hook=1"),
         {"stage2/lapwan.safetensors": f"{SAFE} mixture"}, ("out_high_noise.safetensors", "out_low_noise.safetensors")),
    Call("merge --extract", (*_MERGE, "out.safetensors", "--extract", "--model",
                             "tuned/transformer", "--base", "base/transformer", "--rank", "4", "--device", "cpu"),
         {f"tuned/transformer/{WEIGHTS}": f"{SAFE} weights", "base/transformer/config.json": "json"},
         ("out.safetensors",)),
    Call("merge --average", (*_MERGE, "out.safetensors", "--average", "runs/train_lora"),
         {"runs/train_lora/step_000008/lapwan_high_noise.safetensors": f"{SAFE} lora",
          "runs/train_lora/settings.toml": "toml"},
         ("out_high_noise.safetensors", "out_low_noise.safetensors")),
    Call("generate", ("generate", *BASE, "--prompt", "吸引", *LORAS, *_GENERATE),
         {HIGH: f"{SAFE} lora", **MODEL_FILES, **ENCODER_FILES}, ("out.mp4",)),
    Call("generate --moe", ("generate", *BASE, "--prompt", "电凝钩", *LORAS, "--moe", "stage2/lapwan.safetensors",
                            *_GENERATE), {"stage2/lapwan.safetensors": f"{SAFE} mixture"}, ("out.mp4",)),
    Call("generate --config", ("generate", "--config", "generate.toml"), {"generate.toml": "toml"}, ("out.mp4",)),
    Call("generate --prompts", ("generate", *BASE, "--prompts", "prompts.jsonl", *_GENERATE[:-2], "-o", "out"),
         {"prompts.jsonl": "jsonl"}, ("out",), True),
    Call("generate --image", (*_TINY, "images/a.png"), {"images/a.png": "image"}, ("out.mp4",)),
    Call("generate --video", ("generate", *BASE, "--prompt", "x", "--video", "clips/clip0.mp4", "--start-sigma",
                              "0.9", "--steps", "4", "--size", "48x32", "--num-frames", "5", "-o", "out.mp4"),
         {"clips/clip0.mp4": "video"}, ("out.mp4",)),
    Call("generate --from", ("generate", "--from", "videos/hook.mp4", *BASE, *LORAS, "--moe",
                             "stage2/lapwan.safetensors", *_GENERATE), {"videos/hook.mp4": "video"}, ("out.mp4",)),
    Call("evaluate", ("evaluate", "--config", "settings/evaluate.toml", "-o", "out", "--set", "videos.count=1", "--set",
                      "videos.ceiling=false", "--set", "interval.samples=100"),
         {"settings/evaluate.toml": "toml", "clips/labels.jsonl": "jsonl clips media", HIGH: f"{SAFE} lora",
          "stage2/lapwan.safetensors": f"{SAFE} mixture", "cache/lapwan_index.jsonl": "jsonl index",
          "cache/clip4_00000-005_0080x0064_wan.safetensors": f"{SAFE} cached"}, ("out",), True),
    Call("evaluate --resume", ("evaluate", "--config", "evaluation/settings.toml", "--resume"),
         {"evaluation/settings.toml": "toml", "evaluation/videos/base/clip4_6158ca05_0.json": "json",
          "evaluation/videos/base/clip4_6158ca05_0.mp4": "video"}, ("evaluation",), True),
    Call("train-judge", (*JUDGE, "--steps", "2", "-o", "out.safetensors"),
         {"judge_cache/lapwan_index.jsonl": "jsonl index",
          "judge_cache/clip0_00000-005_0080x0064_wan.safetensors": f"{SAFE} cached",
          "judge_cache/clip0_00000-005_0080x0064_lapwan_roi.safetensors": f"{SAFE} cached",
          "base/vae/config.json": "json", f"base/vae/{WEIGHTS}": f"{SAFE} weights"}, ("out.safetensors",)),
    Call("inspect-weights", ("inspect-weights", HIGH, LOW, "--json", "out.json", "--plot", "out.png"),
         {HIGH: f"{SAFE} lora"}, ("out.json", "out.png")),
    Call("inspect-weights mixture", ("inspect-weights", "stage2/lapwan.safetensors", "--json", "out.json"),
         {"stage2/lapwan.safetensors": f"{SAFE} mixture"}, ("out.json",)),
    Call("inspect-weights run", ("inspect-weights", "runs/train_moe", "--json", "out.json"),
         {"runs/train_moe/metrics.jsonl": "jsonl metrics", "runs/train_moe/settings.toml": "toml",
          "runs/train_moe/step_000008/lapwan.safetensors": SAFE}, ("out.json",)),
    Call("inspect-weights --config", ("inspect-weights", "--config", "inspect.toml"), {"inspect.toml": "toml"},
         ("out.json",)),
    Call("demo --config", ("demo", "--config", "demo.toml"), {"demo.toml": "toml"}, ("out",), True),
    Call("doctor --config", ("doctor", "--config", "doctor.toml"), {"doctor.toml": "toml"}),
)
BY_NAME = {call.name: call for call in CALLS}
# Where damage need not be seen: the file is read after others, is optional, or only some of it is used.
_OPTIONAL = {
    "base/lapwan.json", "base/scheduler/scheduler_config.json", "evaluation/videos/base/clip4_6158ca05_0.json",
    "evaluation/videos/base/clip4_6158ca05_0.mp4", "runs/train_moe/settings.toml", "runs/train_lora/settings.toml",
    "runs/train_lora/metrics.jsonl", "runs/train_moe/metrics.jsonl", "runs/srpo/metrics.jsonl",
    "base/tokenizer/tokenizer_config.json", "clip_model/config.json", "cache/lapwan_settings.toml",
    "cache/lapwan_prompts.safetensors", "base/model_index.json",
}
_OPTIONAL_IN = {  # of one call: what it does not read, or replaces
    ("cache", f"base/transformer/{WEIGHTS}"), ("cache", "base/transformer/config.json"),
    ("train-lora", "base/model_index.json"), ("merge --extract", "base/transformer/config.json"),
    ("cache", "base/text_encoder/config.json"), ("cache", "base/vae/config.json"),
    ("inspect-weights run", "runs/train_moe/step_000008/lapwan.safetensors"),
    ("merge --average", "runs/train_lora/settings.toml"), ("label", "taxonomy.toml"),
    ("generate --from", "videos/hook.mp4"), ("doctor --config", "doctor.toml"), ("cache musubi", "images/a.png"),
}
_UNREAD = {  # of a call, damage to what it does not read or need not understand
    ("merge --dit", "tensor_missing"), ("merge --dit", "tensor_of_another_shape"),  # copies what no LoRA is for
    # Evaluation reads one clip of the cache.
    *(("evaluate", f"{key}_{name}") for key in ("text", "latents", "roi") for name in ("anewlineb", "nowhere.safete")),
    ("train-lora", "largest_float"),  # drops the steps that are not finite, and says so
}


_VALUES = {"nan", "infinite", "largest_float", "alpha_nan", "another_width"}  # which inspect-weights is there to report
# A checkpoint that lacks a file of its state is named, and the one before it is resumed from.
_NO_FILE = {"missing", "folder_in_its_place", "link_to_itself", "link_to_nowhere", "endless"}


@dataclass(frozen=True)
class Kind:
    """A kind of bad input: a call with one thing wrong."""

    name: str
    call: Call
    may_pass: bool = False
    file: str | None = None
    damage: Damage | None = None
    edit: Callable[[Path, Random], None] | None = None
    limits: tuple[tuple[str, int], ...] = ()

    def rng(self, seed: int) -> Random:
        """The same for a kind whatever else is tried."""
        return Random(zlib.crc32(f"{seed} {self.name}".encode()))

    def apply(self, work: Path, seed: int) -> None:
        """Damage the copy."""
        rng = self.rng(seed)
        if self.damage is not None and self.file is not None:
            self.damage.apply(work / self.file, rng)
        if self.edit is not None:
            self.edit(work, rng)

    def is_output(self, path: str) -> bool:
        """Whether `path` is an output, in one, or the settings beside one."""
        inside = path.removeprefix(f"{WORK}/")
        return any(inside in (out, str(Path(out).with_suffix(".settings.toml"))) or inside.startswith(f"{out}/")
                   for out in self.call.output)

    def may_write(self, path: str) -> bool:
        """Whether `path`, in the work folder, may be made or changed though the command fails."""
        return self.call.folder and self.is_output(path)


def file_kinds() -> Iterator[Kind]:
    """Every kind of damage to every file of every call."""
    for call in CALLS:
        for file, formats in call.files.items():
            names = set(formats.split())
            for damage in DAMAGES:
                if names & damage.formats:
                    if (file, damage.name) == ("demo.toml", "empty"):  # no damage: the whole demo
                        continue
                    optional = file in _OPTIONAL or (call.name, file) in _OPTIONAL_IN or (
                        call.command == "evaluate" and "media" in damage.formats) or (  # text to video reads no clip
                        "/state/" in file and damage.name in _NO_FILE) or (
                        call.command == "inspect-weights" and damage.name in _VALUES) or (
                        (call.name, damage.name) in _UNREAD)
                    yield Kind(f"{call.name}: {file}: {damage.name}", call, damage.may_pass or optional, file, damage)


def _with(call: Call, *more: object, drop: int = 0) -> Call:
    arguments = call.arguments[: len(call.arguments) - drop]
    return replace(call, arguments=(*arguments, *map(str, more)))


def _output_call(call: Call, output: str) -> Call:
    """The call with another output."""
    if "--config" in call.arguments and "-o" not in call.arguments:
        return _with(call, "-o", output) if call.command not in ("inspect-weights", "doctor") else _with(
            call, "--json", output)
    arguments = list(call.arguments)
    arguments[arguments.index("--json" if call.command == "inspect-weights" else "-o") + 1] = output
    return replace(call, arguments=tuple(arguments), output=(), folder=False)


def _mk(work: Path, name: str, text: str = "mine") -> None:
    (work / name).parent.mkdir(parents=True, exist_ok=True)
    (work / name).write_text(text, encoding="utf-8")


def _file_for_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("mine", encoding="utf-8")


def output_kinds() -> Iterator[Kind]:
    """Outputs that cannot be written, for every command."""
    usual = [BY_NAME[name] for name in (
        "label", "cache", "train-lora", "train-moe", "srpo", "merge --model", "merge --lora", "generate", "evaluate",
        "inspect-weights", "demo --config")]
    for call in usual:
        suffix = Path(call.output[0]).suffix
        rows: dict[str, tuple[str, Callable[[Path, Random], None] | None]] = {
            "below a file": (f"mine/a{suffix}", lambda work, rng: _mk(work, "mine")),
            "a name of 300 characters": ("x" * 300 + suffix, None),
            "a path of 5000 characters": ("x/" * 2500 + "a" + suffix, None),
            "a link to itself": (
                f"loop{suffix}", lambda work, rng, s=suffix: (work / f"loop{s}").symlink_to(f"loop{s}")),
            "below a link to itself": (f"loop/a{suffix}", lambda work, rng: (work / "loop").symlink_to("loop")),
            "where nothing may be written": (f"/proc/self/fdinfo/a{suffix}", None),
            "below a device": (f"/dev/null/a{suffix}", None),
        }
        if call.folder or not suffix:
            rows["a file"] = ("mine", lambda work, rng: _mk(work, "mine"))
            rows["a folder of the user's"] = ("mine", lambda work, rng: _mk(work, "mine/x.txt"))
        else:
            rows["a folder"] = (f"mine{suffix}", lambda work, rng, s=suffix: _mk(work, f"mine{s}/x.txt"))
            rows["the full device"] = ("/dev/full", None)
        for name, (output, edit) in rows.items():
            cache_folder = call.command == "cache" and name == "a folder of the user's"
            yield Kind(f"{call.name}: output is {name}", replace(_output_call(call, output), output=(output,),
                                                                 folder=cache_folder), cache_folder, edit=edit)


def option_kinds() -> Iterator[Kind]:
    """Values on the command line and in the environment."""
    for command in COMMANDS:
        call = next(c for c in CALLS if c.command == command)
        for name, more in {
            "unknown option with controls": ("--no\x1b[31m\nsuch",), "unknown key": ("--set", "no.such=1"),
            "key with controls": ("--set", "a\n\x07=1"), "key without a value": ("--set", "seed"),
            "config of a folder": ("--config", "clips"), "config of nothing": ("--config", "nowhere\n.toml"),
            "config of a device": ("--config", "/dev/zero"), "config with a long name": ("--config", "x" * 400),
            "a key of 120 kB": ("--set", "x" * 120_000 + "=1"), "config of weights": (
                "--config", f"base/transformer/{WEIGHTS}"),
        }.items():
            made = _with(call, *more)
            if more[0] == "--config" and "--config" in call.arguments:
                arguments = list(call.arguments)
                arguments[arguments.index("--config") + 1] = more[1]
                made = replace(call, arguments=tuple(arguments))
            yield Kind(f"{command}: {name}", made, edit=None)
    for name, value in {"text": "x", "nan": "nan", "infinite": "inf", "digits": mutations.DIGITS, "negative": "-7",
                        "list": "[1,", "newline": "1\n2", "escape": "\x1b[31m1", "huge": "1e308"}.items():
        for call_name, key in (("train-lora", "optimizer.lr"), ("train-lora", "steps"), ("train-moe", "router.top_k"),
                               ("srpo", "sigma"), ("generate --config", "steps"), ("generate", "guidance"),
                               ("merge --lora", "multiplier"), ("evaluate", "interval.level"),
                               ("cache --config", "num_frames"), ("doctor --config", "memory"),
                               ("demo --config", "clips"), ("train-judge", "lr")):
            may_pass = (name, key) in {("huge", "optimizer.lr"), ("negative", "multiplier"), ("negative", "guidance"),
                                       ("huge", "multiplier"), ("huge", "guidance"), ("huge", "memory"),
                                       ("huge", "lr")}
            yield Kind(f"{call_name}: {key} is {name}", _with(BY_NAME[call_name], "--set", f"{key}={value}"), may_pass)


def system_kinds() -> Iterator[Kind]:
    """What the system refuses: descriptors."""
    for name in ("label", "cache", "train-lora", "train-moe", "srpo", "merge --model", "merge --lora", "generate",
                 "evaluate", "inspect-weights", "demo --config"):
        call = BY_NAME[name]
        for descriptors in (6, 9, 14):
            yield Kind(f"{name}: at most {descriptors} open files", call, True,
                       limits=(("RLIMIT_NOFILE", descriptors),))


def tree_kinds() -> Iterator[Kind]:
    """Folders that contain themselves, links that leave, models of wrong parts."""
    def loop(folder: str) -> Callable[[Path, Random], None]:
        return lambda work, rng: (work / folder / "loop").symlink_to("..")

    def leave(work: Path, rng: Random) -> None:
        (work / "base" / "extra").symlink_to(work.parent / OUTSIDE)

    for name, folder in (("merge --model", "base"), ("generate", "base"), ("cache", "clips"), ("train-lora", "cache"),
                         ("inspect-weights run", "runs/train_moe"), ("train-lora --resume", "runs/train_lora")):
        yield Kind(f"{name}: {folder} contains itself", BY_NAME[name], True, edit=loop(folder))
    yield Kind("merge --model: a link in the model leaves it", BY_NAME["merge --model"], True, edit=leave)
    for name in ("merge --model", "generate", "train-lora", "cache", "evaluate"):
        for part in ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer"):
            optional = name in ("merge --model", "cache", "train-lora") and part not in ("transformer",)
            yield Kind(f"{name}: {part} is a file", BY_NAME[name], optional,
                       edit=lambda work, rng, part=part: _file_for_folder(work / "base" / part))

    def steps(name: str, make: Callable[[Path], None]) -> Kind:
        return Kind(f"train-lora --resume: {name}", BY_NAME["train-lora --resume"], True,
                    edit=lambda work, rng: make(work / "runs/train_lora"))

    yield steps("a step of 30 digits", lambda run: (run / ("step_" + "9" * 30)).mkdir())
    yield steps("a step that is a file", lambda run: _mk(run, "step_000099"))
    yield steps("a step that is empty", lambda run: (run / "step_000099").mkdir())
    yield steps("a step that is a link to itself", lambda run: (run / "step_000099").symlink_to("step_000099"))
    yield steps("state is a file", lambda run: _file_for_folder(run / "step_000008/state"))
    yield steps("metrics is a folder", lambda run: mutations.folder_in_its_place(run / "metrics.jsonl", Random(0)))
    yield steps("tensorboard is a file", lambda run: _mk(run, "tensorboard"))
    yield steps("the lock is a folder", lambda run: (run / ".lapwan.lock").mkdir())
    yield steps("the lock holds nonsense", lambda run: _mk(run, ".lapwan.lock", '{"pid": "x\n", "host": []}'))


@cache
def kinds() -> tuple[Kind, ...]:
    """All kinds of bad input, in a fixed order."""
    made = [*output_kinds(), *option_kinds(), *system_kinds(), *tree_kinds(), *file_kinds()]
    return tuple({kind.name: kind for kind in made}.values())


def make_template(folder: Path) -> Path:
    """The artefacts as a trial starts with them, to be linked by `make_work`."""
    work = copy_artefacts(folder / WORK)
    write_inputs(work)
    (folder / OUTSIDE).mkdir()
    (folder / OUTSIDE / "victim.safetensors").write_bytes((work / LOW).read_bytes())
    for path in folder.rglob("*"):  # what a file says of its folder is replaced by `make_work`
        if path.is_file() and str(folder) in (text := path.read_bytes().decode("utf-8", "replace")):
            path.write_text(text.replace(str(folder / WORK), "@work@"), encoding="utf-8")
    return folder


def make_work(template: Path, folder: Path, call: Call | None = None, old_output: bool = False) -> Path:
    """A copy of the template for one trial: hard links, but files that name the folder and runs are copies."""
    def link(source: str, target: str) -> str:
        data = Path(source)
        if data.suffix in (".toml", ".json", ".jsonl") and b"@work@" in (content := data.read_bytes()):
            Path(target).write_bytes(content.replace(b"@work@", str(folder / WORK).encode()))
        elif "/runs/" in source:
            shutil.copy2(source, target)
        else:
            os.link(source, target)
        return target

    shutil.copytree(template, folder, copy_function=link, symlinks=True)
    work = folder / WORK
    if call is not None:
        if call.prepare:
            call.prepare(work)
        if old_output and not call.folder:
            for name in call.output:
                if Path(name).suffix:
                    _mk(work, name, "old")
                else:
                    _mk(work, f"{name}/old.txt", "old")
    return work


def took_canary(work: Path) -> bool:
    """Whether hostile code ran."""
    return any(work.rglob(CANARY))


def select(names: Sequence[Kind], share: int, seed: int) -> list[Kind]:
    """About `share` kinds, every call and every kind of damage at least once before any comes twice."""
    rng = Random(seed)
    shuffled = rng.sample(list(names), len(names))
    counts: dict[str, int] = {}

    def rank(kind: Kind) -> tuple[int, int]:
        keys = (kind.call.name, kind.damage.name if kind.damage else kind.name)
        value = sum(counts.get(key, 0) for key in keys)
        for key in keys:
            counts[key] = counts.get(key, 0) + 1
        return value, 0

    ranked = sorted(((rank(kind), index) for index, kind in enumerate(shuffled)))
    return [shuffled[index] for _, index in ranked[:share]]
