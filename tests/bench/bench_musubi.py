"""A cache folder shared by lapwan and musubi-tuner, by musubi-tuner's own code.

    pip install opencv-python-headless toml voluptuous einops      # what its dataset code imports
    python tests/bench/bench_musubi.py --musubi DIR

DIR is a checkout of musubi-tuner. Its dataset configuration, its two caching loops (`encode_datasets` and
`process_text_encoder_batches`, with `--skip_existing`, which also delete stray files), its save functions and its
loader for training run from there; its encoders are replaced by those of lapwan's embedded model, so that no weights
are needed. Clips are at the model's frame rate, since musubi-tuner does not read the files' own.

Each row is one claim: what the tools name, read, write and leave alone in one folder, in both orders. The exit code is
the number of rows that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from lapwan import console
from lapwan.caching.read import load_index, read_item
from lapwan.models.spec import TEXT_LENGTH
from lapwan.tiny.resolve import resolve
from lapwan.wan.image_condition import encode_condition, with_mask
from lapwan.wan.text import encode_text, load_text_encoder
from lapwan.wan.vae import encode, load_vae

SIZES = {"wide": (160, 96), "square": (96, 96), "tall": (64, 112), "抓钳 long": (128, 96)}
FRAMES, FPS = 20, 16
DATASET = """
[general]
resolution = [96, 64]
caption_extension = ".txt"
batch_size = 2
enable_bucket = {buckets}

[[datasets]]
video_directory = "{root}/videos"
cache_directory = "{root}/{cache}_videos"
target_frames = [1, 9]
frame_extraction = "{extraction}"
frame_sample = 2

[[datasets]]
image_directory = "{root}/images"
cache_directory = "{root}/{cache}_images"
"""


class Musubi:
    """musubi-tuner's caching and loading, from a checkout."""

    def __init__(self, checkout: Path) -> None:
        sys.path.insert(0, str(checkout / "src"))
        logging.disable(logging.WARNING)
        load = importlib.import_module
        self.config = load("musubi_tuner.dataset.config_utils")
        self.data = load("musubi_tuner.dataset.image_video_dataset")
        self.latents = load("musubi_tuner.cache_latents")
        self.texts = load("musubi_tuner.cache_text_encoder_outputs")
        self.written = 0

    def datasets(self, path: Path, training: bool = False) -> list[Any]:
        """The datasets of a configuration file."""
        config = self.config
        user = config.load_user_config(str(path))
        blueprint = config.BlueprintGenerator(config.ConfigSanitizer()).generate(
            user, argparse.Namespace(debug_dataset=False), architecture=self.data.ARCHITECTURE_WAN)
        epoch = SimpleNamespace(value=0)
        group = config.generate_dataset_group_by_blueprint(
            blueprint.dataset_group, training=training, num_timestep_buckets=None, shared_epoch=epoch)
        return list(group.datasets)

    def cache(self, path: Path, i2v: bool) -> int:
        """Run both caching loops as with --skip_existing; the number of files written."""
        self.written = 0
        datasets = self.datasets(path)
        options = argparse.Namespace(num_workers=1, skip_existing=True, batch_size=None, keep_cache=False)
        self.latents.encode_datasets(datasets, lambda batch: self._encode(batch, i2v), options)
        before, paths = self.texts.prepare_cache_files_and_paths(datasets)
        self.texts.process_text_encoder_batches(1, True, None, datasets, before, paths, self._encode_texts)
        self.texts.post_process_cache_files(datasets, before, paths, False)
        return self.written

    def _encode(self, batch: list[Any], i2v: bool) -> None:
        for item in batch:
            content = np.asarray(item.content)
            pixels = torch.from_numpy(content if content.ndim == 4 else content[None])
            pixels_BCTHW = pixels.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            with torch.no_grad():
                latents = encode(_vae(i2v), pixels_BCTHW)
                frames = pixels_BCTHW.shape[2]
                first = latents if frames == 1 else encode_condition(_vae(i2v), pixels_BCTHW[:, :, 0], frames)
            self.data.save_latent_cache_wan(item, latents[0], None, with_mask(first)[0] if i2v else None, None)
            self.written += 1

    def _encode_texts(self, batch: list[Any]) -> None:
        save = importlib.import_module("musubi_tuner.dataset.cache_io").save_text_encoder_output_cache_wan
        for item, features in zip(batch, encode_text(_text_encoder(), [item.caption for item in batch], TEXT_LENGTH),
                                  strict=True):
            save(item, features)
            self.written += 1

    def batches(self, path: Path) -> list[dict[str, Any]]:
        """Every batch of its loader, one epoch."""
        return [dataset[number] for dataset in self.datasets(path, training=True) for number in range(len(dataset))]


@cache
def _vae(i2v: bool) -> Any:
    return load_vae(resolve("tiny-i2v" if i2v else "tiny-t2v"), device=torch.device("cpu"))


@cache
def _text_encoder() -> Any:
    return load_text_encoder(resolve("tiny-t2v"))


def make_media(root: Path) -> None:
    """Videos of several shapes and two images, each with a caption."""
    (root / "videos").mkdir()
    (root / "images").mkdir()
    for number, (name, (width, height)) in enumerate(SIZES.items()):
        with av.open(str(root / "videos" / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=FPS)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for index in range(FRAMES):
                pixels = np.full((height, width, 3), 30 + 10 * index, np.uint8)
                pixels[:, (4 * index + 9 * number) % width] = 255
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        (root / "videos" / f"{name}.txt").write_text(f"剪刀 scissors {number}", encoding="utf-8")
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (90, 130, 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"i{number}.png")
        (root / "images" / f"i{number}.txt").write_text(f"image {number}", encoding="utf-8")


def config(root: Path, cache: str, buckets: bool, extraction: str) -> Path:
    """A dataset file whose cache folders begin with `cache`."""
    path = root / f"{cache}.toml"
    path.write_text(DATASET.format(root=root, cache=cache, buckets=str(buckets).lower(), extraction=extraction))
    return path


def lapwan_cache(path: Path, i2v: bool) -> None:
    """`lapwan cache --dataset path`."""
    from lapwan.commands.cache import run
    from lapwan.settings.base import RunOptions
    from lapwan.settings.cache import CacheSettings

    settings = CacheSettings(dataset=path, model="tiny-i2v" if i2v else "tiny-t2v", device="cpu", workers=0)
    with contextlib.redirect_stdout(sys.stderr):
        run(settings, RunOptions())


def lapwan_train(folder: Path, output: Path, i2v: bool) -> int:
    """Two steps of `lapwan train-lora` on a cache; the number of steps in its metrics."""
    from lapwan.commands.train_lora import run
    from lapwan.settings.base import RunOptions
    from lapwan.settings.train_lora import TrainLoraSettings

    settings = TrainLoraSettings.model_validate({
        "model": "tiny-i2v" if i2v else "tiny-t2v", "output": output, "data": {"cache": folder}, "steps": 2, "rank": 2,
        "batch_size": 1, "device": "cpu", "noise_experts": ["high"]})
    with contextlib.redirect_stdout(sys.stderr):
        run(settings, RunOptions())
    return len([line for line in (output / "metrics.jsonl").read_text().splitlines() if "loss" in json.loads(line)])


def state(root: Path, cache: str) -> dict[str, tuple[int, str]]:
    """Time and content of every file of the two folders that musubi-tuner knows."""
    return {f"{path.parent.name}/{path.name}": (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            for kind in ("videos", "images") for path in (root / f"{cache}_{kind}").glob("*_wan*.safetensors")}


def same_tensors(root: Path, cache: str, batches: list[dict[str, Any]]) -> bool:
    """Whether the loader's batches hold the latents and text of lapwan's items, each once."""
    theirs = [(row, text) for batch in batches
              for row, text in zip(batch["latents"], batch["t5"], strict=True)]
    ours = []
    for kind in ("videos", "images"):
        index = load_index(root / f"{cache}_{kind}")
        ours += [read_item(index.folder, item) for item in index.items]
    left = list(theirs)
    for tensors in ours:
        match = next((n for n, (row, text) in enumerate(left) if row.shape == tensors["latents"].shape
                      and row.float().equal(tensors["latents"]) and text.equal(tensors["text"])), None)
        if match is None:
            return False
        del left[match]
    return not left and len(ours) == len(theirs)


def rows(musubi: Musubi, root: Path, buckets: bool, extraction: str, i2v: bool) -> Iterator[tuple[str, bool, str]]:
    """(claim, whether it holds, figures) for one dataset."""
    first, second, both = (config(root, f"{name}_{i2v}_{buckets}_{extraction}", buckets, extraction)
                           for name in ("lapwan", "musubi", "both"))
    lapwan_cache(first, i2v)
    ours = state(root, first.stem)
    if buckets:
        batches = musubi.batches(first)
        yield ("its loader yields every item of lapwan's cache, equal", same_tensors(root, first.stem, batches),
               f"{len(batches)} batches, {sum(len(batch['latents']) for batch in batches)} items")
        condition = all(("latents_image" in batch) == i2v for batch in batches)
        yield "the image condition is in its batches for I2V alone", condition, str(sorted(batches[0]))
    written = musubi.cache(first, i2v)
    yield ("its caching after lapwan's writes and deletes nothing", not written and state(root, first.stem) == ours,
           f"{len(ours)} files, {written} written")

    musubi.cache(second, i2v)
    theirs = state(root, second.stem)
    strip = lambda names, stem: {name.replace(stem, "") for name in names}  # noqa: E731
    yield ("both name the same files", strip(ours, first.stem) == strip(theirs, second.stem), f"{len(theirs)} files")
    lapwan_cache(second, i2v)
    yield "lapwan's caching after its writes and deletes nothing", state(root, second.stem) == theirs, ""
    for kind in ("videos", "images"):
        folder = root / f"{second.stem}_{kind}"
        steps, items = lapwan_train(folder, root / f"run_{folder.name}", i2v), len(load_index(folder).items)
        yield f"lapwan trains on its files ({kind})", steps == 2, f"{items} items, {steps} steps"

    away = [root / "videos" / "wide.mp4", root / "images" / "i0.png"]
    for path in away:
        path.rename(path.with_suffix(".away"))
    musubi.cache(both, i2v)
    part = state(root, both.stem)
    for path in away:
        path.with_suffix(".away").rename(path)
    lapwan_cache(both, i2v)
    whole = state(root, both.stem)
    written = musubi.cache(both, i2v)
    lapwan_cache(both, i2v)
    kept = all(whole.get(name) == stamp for name, stamp in part.items())
    again = state(root, both.stem)
    yield ("in one folder, in turn: no file written twice", kept and not written and again == whole,
           f"{len(part)} by it, {len(whole) - len(part)} by lapwan")
    if buckets:
        yield "and its loader yields all of them", same_tensors(root, both.stem, musubi.batches(both)), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--musubi", type=Path, required=True, help="a checkout of musubi-tuner")
    options = parser.parse_args()
    console.set_level(console.QUIET)
    musubi = Musubi(options.musubi)
    failed = 0
    print("| dataset | claim | holds | |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_media(Path(folder))
        cases: list[tuple[bool, str, bool]] = [
            (True, "head", False), (True, "uniform", True), (True, "chunk", False), (False, "head", False)]
        for buckets, extraction, i2v in cases:
            name = f"{'I2V' if i2v else 'T2V'}, {extraction}, enable_bucket = {str(buckets).lower()}"
            for claim, holds, figures in rows(musubi, Path(folder), buckets, extraction, i2v):
                failed += not holds
                print(f"| {name} | {claim} | {'yes' if holds else 'NO'} | {figures} |", flush=True)
    print(f"\n{failed} rows failed")
    sys.exit(failed)


if __name__ == "__main__":
    main()
