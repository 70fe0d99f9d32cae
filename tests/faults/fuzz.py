"""Readers in this process on damaged files: only a line for the user may come of them.

`python fuzz.py READER --seconds S --seed N --out DIR` fuzzes one reader in a process of its own; `READERS` are all. A
finding is an error that the command line would show as a traceback, a crash, more than 2 GiB, or more than 10 s. Its
file is kept, made as small as it can be, and `python fuzz.py READER --repeat FILE` shows the traceback.

How to add a reader: a function with `@reader`, the file that it reads, and that file's formats in `mutations`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from calls import CACHE_FILES, HIGH, WEIGHTS, make_template, make_work
from mutations import DAMAGES, replace

SECONDS, MEMORY = 10, 2 << 30  # of one reading
_SLOW = {"endless", "long_value", "long_toml_value", "header_of_50_megabytes", "image_bomb", "zip_bomb",
         "image_text_bomb", "toml_key_of_a_megabyte", "missing", "folder_in_its_place", "link_to_nowhere"}
_WORDS = (b"null", b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 400, b"[]", b"{}", b"[[", b'"', b"\\u0000", b"\\ud800",
          b"../", b"true", b"0", b"\n", b"\x00", b"\xff", b"1.5", b"18446744073709551616", b"'", b"=", b"[a]")

Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Reader:
    """A reader: `read` is given the work folder; `file` in it is damaged."""

    name: str
    file: str
    formats: frozenset[str]
    make: Callable[[Path], Read]


READERS: dict[str, Reader] = {}


def reader(name: str, file: str, formats: str) -> Callable[[Callable[[Path], Read]], Callable[[Path], Read]]:
    """Register a function that prepares a reader."""
    def register(make: Callable[[Path], Read]) -> Callable[[Path], Read]:
        READERS[name] = Reader(name, file, frozenset(formats.split()), make)
        return make
    return register


@reader("lora", HIGH, "safetensors lora")
def _lora(work: Path) -> Read:
    from lapwan.lora.formats import open_for_use

    def read(path: Path) -> None:
        for adapter in open_for_use(path).values():
            adapter.report()
            adapter.read_finite()
            adapter.fingerprint()
    return read


@reader("mixture", "stage2/lapwan.safetensors", "safetensors mixture")
def _mixture(work: Path) -> Read:
    from lapwan.moe.mixture_file import read_mixture

    return read_mixture


@reader("judge", "judge.safetensors", "safetensors")
def _judge(work: Path) -> Read:
    from lapwan.evaluation.judge_file import read_judge

    return read_judge


@reader("inspect", "stage2/lapwan.safetensors", "safetensors mixture")
def _inspect(work: Path) -> Read:
    from lapwan.commands.inspect_weights import run
    from lapwan.settings.base import RunOptions
    from lapwan.settings.inspect_weights import InspectWeightsSettings

    return lambda path: run(InspectWeightsSettings(files=(path,)), RunOptions())


@reader("cache index", "cache/lapwan_index.jsonl", "jsonl index")
def _index(work: Path) -> Read:
    from lapwan.caching.read import load_index, read_empty_text

    return lambda path: read_empty_text(load_index(path.parent))


@reader("cache file", next(name for name in CACHE_FILES if name.endswith("_wan.safetensors")), "safetensors cached")
def _cached(work: Path) -> Read:
    from lapwan.caching.read import load_index, read_item

    items = load_index(work / "cache").items
    return lambda path: [read_item(path.parent, item) for item in items if item.latents == path.name]


@reader("text features", "cache/clip0_wan_te.safetensors", "safetensors cached")
def _features(work: Path) -> Read:
    from lapwan.caching.read import load_index, read_item

    items = load_index(work / "cache").items
    return lambda path: [read_item(path.parent, item) for item in items if item.text == path.name]


@reader("clips", "clips/labels.jsonl", "jsonl clips media")
def _clips(work: Path) -> Read:
    from lapwan.data.clips import read_clips, read_source_clips

    return lambda path: (list(read_clips(path)), read_source_clips(path))


def _settings(name: str, file: str, module: str, model: str) -> None:
    @reader(name, file, "toml")
    def make(work: Path) -> Read:
        from lapwan.settings.load import load

        settings = getattr(importlib.import_module(f"lapwan.settings.{module}"), model)
        return lambda path: load(settings, config=path, environment={})


_settings("train-lora settings", "settings/train_lora.toml", "train_lora", "TrainLoraSettings")
_settings("train-moe settings", "settings/train_moe.toml", "train_moe", "TrainMoeSettings")
_settings("srpo settings", "settings/srpo.toml", "srpo", "SrpoSettings")
_settings("evaluate settings", "settings/evaluate.toml", "evaluate", "EvaluateSettings")
_settings("generate settings", "generate.toml", "generate", "GenerateSettings")


@reader("musubi dataset", "dataset.toml", "toml")
def _musubi(work: Path) -> Read:
    from lapwan.data.musubi_dataset import read_musubi_dataset

    return lambda path: read_musubi_dataset(path, work / "out", 4, 4)


@reader("taxonomy", "taxonomy.toml", "toml")
def _taxonomy(work: Path) -> Read:
    from lapwan.data.taxonomy import load_taxonomy

    return lambda path: load_taxonomy(str(path))


def _prompts(name: str, formats: str) -> None:
    @reader(f"prompts {formats}", name, formats)
    def make(work: Path) -> Read:
        from lapwan.data.prompts import read_prompts

        return read_prompts


_prompts("prompts.yaml", "yaml")
_prompts("prompts.json", "json")
_prompts("prompts.txt", "text")


def _model(name: str, file: str, formats: str) -> None:
    @reader(name, file, formats)
    def make(work: Path) -> Read:
        from lapwan.models.spec import read_spec
        from lapwan.names import NoiseExpert
        from lapwan.wan.backbone import load_transformer
        from lapwan.wan.text import encode_text, load_text_encoder
        from lapwan.wan.vae import load_vae

        def read(path: Path) -> None:
            spec = read_spec(work / "base")
            if path.parent.name in ("base", "transformer", "scheduler"):
                load_transformer(spec, NoiseExpert.HIGH)
                spec.fingerprint(NoiseExpert.HIGH)
            elif path.parent.name == "vae":
                load_vae(spec)
            else:
                encode_text(load_text_encoder(spec), ["吸引"])
        return read


_model("model index", "base/model_index.json", "json")
_model("model config", "base/transformer/config.json", "json")
_model("model weights", f"base/transformer/{WEIGHTS}", "safetensors weights shards")
_model("scheduler config", "base/scheduler/scheduler_config.json", "json")
_model("lapwan.json", "base/lapwan.json", "json")
_model("VAE config", "base/vae/config.json", "json")
_model("VAE weights", f"base/vae/{WEIGHTS}", "safetensors weights")
_model("text encoder config", "base/text_encoder/config.json", "json")
_model("text encoder weights", "base/text_encoder/model.safetensors", "safetensors weights")
_model("tokenizer", "base/tokenizer/tokenizer.json", "json")
_model("tokenizer config", "base/tokenizer/tokenizer_config.json", "json")


def _trainer(work: Path) -> Any:
    import torch

    from lapwan.settings.load import load
    from lapwan.settings.train_lora import TrainLoraSettings
    from lapwan.tiny.resolve import resolve_base
    from lapwan.train import recipe
    from lapwan.train.lora.recipe import prepare

    settings = load(TrainLoraSettings, config=work / "runs/train_lora/settings.toml", environment={},
                    sets=["resume=true", "allow_changed=true"])
    base = resolve_base(settings.model)
    return prepare(settings, base, recipe.read_data(settings, base), torch.device("cpu"))


def _checkpoint(name: str, file: str, formats: str) -> None:
    @reader(name, f"runs/train_lora/step_000012/state/{file}", formats)
    def make(work: Path) -> Read:
        trainer = _trainer(work)
        return lambda path: trainer.resume()


_checkpoint("checkpoint", "rest.pt", "pickle rest")
_checkpoint("checkpoint's tensors", "trained.safetensors", "safetensors state")


@reader("metrics", "runs/train_moe/metrics.jsonl", "jsonl metrics")
def _metrics(work: Path) -> Read:
    from lapwan.diagnostics.mixture import routing_windows
    from lapwan.diagnostics.run_folder import learning_rates, metrics, noise_expert_steps

    def read(path: Path) -> None:
        lines = metrics(path.parent)
        learning_rates(lines, 5)
        noise_expert_steps(lines, "high", 5)
        routing_windows(lines, ("scissors", "hook", "suction", "other"), 5)
    return read


@reader("image", "images/a.png", "image")
def _image(work: Path) -> Read:
    from lapwan.sampling.start_image import open_image

    return open_image


@reader("video", "clips/clip0.mp4", "video")
def _video(work: Path) -> Read:
    from lapwan.sampling.start_image import read_clip

    return lambda path: read_clip(path, 5, (48, 32), 8)


@reader("video metadata", "videos/hook.mp4", "video")
def _video_metadata(work: Path) -> Read:
    from lapwan.sampling.result import recorded_settings
    from lapwan.settings.generate import GenerateSettings

    return lambda path: recorded_settings(path, GenerateSettings(from_video=path, prompt="x"))


# ---- fuzzing


class _TooLong(BaseException):
    pass


def _alarm(number: int, frame: Any) -> None:
    raise _TooLong


def is_finding(error: BaseException) -> bool:
    """Whether the command line would show a traceback."""
    from lapwan.data.dropped_clips import BadClip
    from lapwan.errors import Interrupted, UserError

    if isinstance(error, UserError | Interrupted | BadClip):
        return False
    if importlib.util.find_spec("lapwan.faults") is not None:
        mapped = importlib.import_module("lapwan.faults").user_error(error)
        return mapped is None
    return True


def attempt(read: Read, path: Path) -> BaseException | None:
    """The error of one reading that is a finding; None for success and for what the user is told in a line."""
    signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
    before = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read(path)
    except _TooLong:
        return TimeoutError(f"more than {6 * SECONDS} s")
    except SystemExit as error:
        return error
    except MemoryError as error:
        return error
    except Exception as error:  # noqa: BLE001  which errors come is the question
        if is_finding(error):
            return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if (cpu := time.process_time() - before) > SECONDS:
        return TimeoutError(f"{cpu:.0f} s of CPU")
    return None


def key_of(error: BaseException) -> str:
    """Equal for findings of one cause: the error's type and lapwan's innermost line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/lapwan/" in frame.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "?"
    return f"{type(error).__name__} at {where}"


def havoc(data: bytes, rng: Random) -> bytes:
    """Some edits that know nothing of the format."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        size = rng.choice((1, 2, 8, 64))
        match rng.randrange(7):
            case 0 if out:
                out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + size] = b""
            case 2:
                out[at:at] = out[at : at + size]
            case 3:
                out[at:at] = rng.choice(_WORDS)
            case 4:
                out[at : at + size] = rng.choice(_WORDS)
            case 5:
                out[at : at + size] = rng.randbytes(size)
            case _:
                start = rng.randrange(len(out) + 1)
                out[at:at] = out[start : start + size]
    return bytes(out)


def _near_front(data: bytes, rng: Random) -> bytes:
    """As `havoc`, in the first part of a file, where headers are."""
    size = min(len(data), rng.choice((64, 512, 4096)))
    return havoc(data[:size], rng) + data[size:]


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def minimise(read: Read, path: Path, key: str, seconds: float) -> None:
    """Remove what the finding does not need, for some seconds."""
    if path.is_dir() or path.is_symlink() or not path.exists() or path.stat().st_size > 1 << 20:
        return
    deadline = time.monotonic() + seconds
    data = path.read_bytes()
    size = max(1, len(data) // 2)
    while size and time.monotonic() < deadline:
        at = 0
        while at < len(data) and time.monotonic() < deadline:
            smaller = data[:at] + data[at + size :]
            replace(path, smaller)
            error = attempt(read, path)
            if error is not None and key_of(error) == key:
                data = smaller
            else:
                at += size
        size //= 2
    replace(path, data)


def fuzz(name: str, seconds: float, seed: int, out: Path) -> None:
    """Fuzz one reader; a JSON line on stdout for each finding, the last one counts the readings."""
    made = READERS[name]
    rng = Random(f"{seed} {name}")
    damages = [damage for damage in DAMAGES if damage.formats & made.formats]
    fast = [damage for damage in damages if damage.name not in _SLOW]
    readings, keys = 0, set[str]()
    with tempfile.TemporaryDirectory(prefix="lapwan-fuzz-") as folder:
        root = Path(folder)
        work = make_work(make_template(root / "template"), root / "work")
        os.chdir(work)
        read, path = made.make(work), work / made.file
        backup = root / "valid"
        shutil.copy2(path, backup)
        assert attempt(read, path) is None, "the valid file cannot be read"
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY,) * 2)
        valid, siblings = backup.read_bytes(), {entry.name for entry in path.parent.iterdir()}
        deadline, stopped = time.monotonic() + seconds, list[int]()
        signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
        while time.monotonic() < deadline and not stopped:
            for entry in path.parent.iterdir():
                if entry.name not in siblings:
                    _remove(entry)
            replace(path, valid)
            how = "bytes"
            if rng.random() < 0.5:
                damage = rng.choice(damages if rng.random() < 0.02 else fast)
                how = damage.name
                with contextlib.suppress(Exception):
                    damage.apply(path, rng)
                if rng.random() < 0.3 and path.is_file() and path.stat().st_size < 1 << 20 and not path.is_symlink():
                    replace(path, _near_front(path.read_bytes(), rng))
            else:
                replace(path, rng.choice((havoc, _near_front))(valid, rng))
            _keep(path, out / f"{_plain(name)}-current{path.suffix}")
            readings += 1
            error = attempt(read, path)
            if error is None or (key := key_of(error)) in keys:
                continue
            keys.add(key)
            minimise(read, path, key, min(5.0, seconds / 10))
            kept = out / f"{_plain(name)}-{len(keys)}{path.suffix}"
            _keep(path, kept)
            print(json.dumps({"reader": name, "key": key, "how": how, "text": str(error)[:160], "file": str(kept)}),
                  flush=True)
    (out / f"{_plain(name)}-current{path.suffix}").unlink(missing_ok=True)
    print(json.dumps({"reader": name, "readings": readings}), flush=True)


def _plain(name: str) -> str:
    return name.replace(" ", "_").replace("'", "")


def _keep(path: Path, target: Path) -> None:
    _remove(target)
    if path.is_symlink():
        target.symlink_to(os.readlink(path))  # noqa: PTH115  as it is
    elif path.is_file():
        shutil.copyfile(path, target)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> None:
    """Fuzz one reader, or repeat a finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=list(READERS))
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz"))
    parser.add_argument("--repeat", type=Path)
    given = parser.parse_args()
    if given.repeat is None:
        given.out.mkdir(parents=True, exist_ok=True)
        fuzz(given.reader, given.seconds, given.seed, given.out.resolve())
        return
    repeated = given.repeat.resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = make_work(make_template(Path(folder) / "template"), Path(folder) / "work")
        os.chdir(work)
        made = READERS[given.reader]
        read, path = made.make(work), work / made.file
        _keep(repeated, path)
        error = attempt(read, path)
        print("no finding" if error is None else "".join(traceback.format_exception(error)))


if __name__ == "__main__":
    main()
