"""Small real videos for the tests of cache, made with PyAV."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def make_video(path: Path, frames: int = 20, size: tuple[int, int] = (96, 64), fps: int = 16, seed: int = 0,
               codec: str = "libx264", pixel_format: str = "yuv420p", pts: list[int] | None = None) -> Path:
    """A video of `size` (width, height): frame i is a flat grey of level 8 + 8·i mod 240, with a bright moving bar.

    `pts` in milliseconds makes a variable frame rate.
    """
    width, height = size
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        if codec == "libx264":
            stream.options = {"crf": "8"}
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            pixels = np.full((height, width, 3), level(index), np.uint8)
            pixels[:, (3 * index + seed) % width] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def make_image(path: Path, size: tuple[int, int] = (96, 64), seed: int = 0) -> Path:
    """A picture of noise."""
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def level(index: int) -> int:
    """The grey of frame `index` of `make_video`."""
    return 8 + (8 * index) % 240


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def cache_tiny(dataset: Path | None, output: Path, overwrite: bool = False, **settings: object) -> Path:
    """Run `lapwan cache` in this process on the embedded model, 9 frames of 32x48; gives the folder back."""
    from lapwan.commands.cache import run
    from lapwan.settings.base import RunOptions
    from lapwan.settings.cache import CacheSettings

    # Workers that decode are a matter of test_cache_faults.py; here they would take longer to start than to decode.
    chosen = {"model": "tiny-t2v", "device": "cpu", "workers": 0} | settings
    if dataset is not None and dataset.suffix == ".jsonl":
        chosen = {"size": (32, 48), "num_frames": (9,)} | chosen
    run(CacheSettings(dataset=dataset, output=output, **chosen), RunOptions(overwrite=overwrite))
    return output


def copied(path: Path) -> dict:
    """Tensors that no longer lie in the file, which is about to be overwritten."""
    from safetensors.torch import load_file

    return {key: value.clone() for key, value in load_file(path).items()}


def strip_recipes(folder: Path) -> None:
    """What musubi-tuner would have written: no recipes, no index, no prompts."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    for path in folder.glob("*.safetensors"):
        if path.name.startswith("lapwan_") or "_lapwan_" in path.name:
            path.unlink()
            continue
        with safe_open(path, "pt") as file:
            metadata = {k: v for k, v in file.metadata().items() if not k.startswith("lapwan")}
        save_file(copied(path), path, metadata)
    (folder / "lapwan_index.jsonl").unlink()
