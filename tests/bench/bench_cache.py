"""How fast `lapwan cache` is, against encoding with diffusers in a plain loop, on the same clips in the same run.

    python tests/bench/bench_cache.py [--full] [--clips 12] [--device cuda] [--plan-clips 1000]

`--full` takes the full-size VAE (random weights: speed says nothing of quality) at 480x832x81; without it the embedded
model at 64x64x17. Also: how long a second run takes to plan over many clips.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from cache_clips import write_jsonl

from lapwan.caching.cache_folder import CacheOptions, build_cache, encoders_from_settings
from lapwan.data.dataset import extraction_from_settings, read_dataset
from lapwan.distributed import Processes
from lapwan.models.device import pick_device
from lapwan.models.spec import read_spec
from lapwan.settings.cache import CacheSettings
from lapwan.tiny.model import tiny_folder
from lapwan.wan.vae import load_vae, normalise


def full_size(folder: Path) -> Path:
    """The embedded I2V folder with a VAE of the full size."""
    from diffusers import AutoencoderKLWan

    shutil.copytree(tiny_folder("i2v"), folder)
    shutil.rmtree(folder / "vae")
    torch.manual_seed(0)
    AutoencoderKLWan().save_pretrained(folder / "vae")
    return folder


def make_clips(folder: Path, count: int, size: tuple[int, int], seconds: float, fps: int = 25) -> Path:
    """Moving noise over a gradient: costs a decoder what a real clip costs."""
    rng = np.random.default_rng(0)
    width, height = size
    texture = rng.integers(0, 255, (height + 64, width + 64, 3), np.uint8)
    texture = np.asarray(Image.fromarray(texture).resize((width // 8, height // 8)).resize((width + 200, height + 200)))
    rows = []
    for index in range(count):
        path = folder / f"clip_{index:04d}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"preset": "veryfast", "crf": "23"}
            for at in range(int(seconds * fps)):
                shift = (2 * at + 3 * index) % 200
                pixels = np.ascontiguousarray(texture[shift : shift + height, shift : shift + width])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        rows.append({"video_path": path.name, "caption": f"剪刀 {index}"})
    return write_jsonl(folder / "clips.jsonl", rows)


@torch.no_grad()
def plain_loop(dataset: Path, spec, settings: CacheSettings, out: Path, condition: bool, device, dtype) -> dict:
    """What a script on diffusers does: decode, encode, write, one clip after the other."""
    out.mkdir()
    vae = load_vae(spec, dtype, device)
    height, width = settings.size
    (frames_wanted,) = settings.num_frames
    seconds = {"decode": 0.0, "encode": 0.0, "write": 0.0}
    begun = time.perf_counter()
    for path in sorted(dataset.parent.glob("*.mp4")):
        start = time.perf_counter()
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            frames = [np.asarray(frame.to_image().resize((width, height), Image.Resampling.LANCZOS))
                      for frame in container.decode(video=0)]
        picked = np.stack([frames[int(k * 25 / 16)] for k in range(frames_wanted)])
        seconds["decode"] += time.perf_counter() - start
        start = time.perf_counter()
        pixels = (torch.from_numpy(picked).to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1).to(dtype)
        tensors = {"latents": normalise(vae, vae.encode(pixels).latent_dist.mode().float())[0].cpu()}
        if condition:
            video = torch.cat([pixels[:, :, :1], torch.zeros_like(pixels[:, :, 1:])], dim=2)
            tensors["image"] = normalise(vae, vae.encode(video).latent_dist.mode().float())[0].cpu()
        seconds["encode"] += time.perf_counter() - start
        start = time.perf_counter()
        save_file(tensors, out / f"{path.stem}.safetensors")
        seconds["write"] += time.perf_counter() - start
    return seconds | {"total": time.perf_counter() - begun}


def ours(dataset: Path, spec, settings: CacheSettings, out: Path, condition: bool) -> dict:
    import dataclasses

    encoders = dataclasses.replace(encoders_from_settings(settings, spec), condition=condition)
    (cache,) = read_dataset(dataset, out, extraction_from_settings(settings, spec))
    begun = time.perf_counter()
    options = CacheOptions(text=False, device=settings.device, vae_dtype=settings.vae_dtype)
    result = build_cache(cache, encoders, spec, options, Processes())
    return result.seconds | {"total": time.perf_counter() - begun, "latents written": result.latents}


def show(name: str, count: int, seconds: dict) -> None:
    rest = ", ".join(f"{key} {value:.2f}" for key, value in seconds.items() if key != "total")
    print(f"{name:42s} {count / seconds['total']:7.3f} clips/s   total {seconds['total']:.2f} s   ({rest})", flush=True)


def plan_benchmark(folder: Path, count: int) -> None:
    """A second run over `count` clips, as a whole process."""
    make_clips(folder, 1, (96, 64), 1.2)
    for index in range(1, count):
        shutil.copyfile(folder / "clip_0000.mp4", folder / f"clip_{index:04d}.mp4")
    dataset = write_jsonl(folder / "clips.jsonl", [
        {"video_path": f"clip_{i:04d}.mp4", "caption": f"剪刀 {i}"} for i in range(count)])
    command = [sys.executable, "-m", "lapwan", "cache", "--dataset", str(dataset), "--model", "tiny-t2v", "-o",
               str(folder / "cache"), "--size", "32x48", "--num-frames", "5", "--device", "cpu"]
    for name in ("first run", "second run", "second run"):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        print(f"{name} over {count} clips: {time.perf_counter() - start:.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--plan-clips", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "clips").mkdir()
        spec = read_spec(full_size(root / "model") if options.full else tiny_folder("i2v"))
        size, frames, source = ((480, 832), 81, (1280, 720)) if options.full else ((64, 64), 17, (320, 240))
        dataset = make_clips(root / "clips", options.clips, source, frames / 16 + 0.2)
        device = pick_device(options.device)
        print(f"{options.clips} clips of {source[0]}x{source[1]} to {frames} frames of {size[0]}x{size[1]} on {device}")
        for dtype in options.dtypes.split(","):
            for condition in (False, True):
                settings = CacheSettings(dataset=dataset, model=str(spec.path), output=root / "x", size=size,
                                         num_frames=(frames,), device=str(device), vae_dtype=dtype)
                task = "i2v" if condition else "t2v"
                show(f"plain loop {task} {dtype}", options.clips, plain_loop(
                    dataset, spec, settings, root / f"plain-{task}-{dtype}", condition, device, getattr(torch, dtype)))
                show(f"lapwan     {task} {dtype}", options.clips,
                     ours(dataset, spec, settings, root / f"ours-{task}-{dtype}", condition))
        if options.plan_clips:
            (root / "many").mkdir()
            plan_benchmark(root / "many", options.plan_clips)


if __name__ == "__main__":
    main()
