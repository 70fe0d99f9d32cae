"""The models and clips of the rehearsal and of bench_5b: sizes of A14B and TI2V-5B in the released layout, random
weights of a seed."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "net"))

T2V, I2V, TI2V = "Wan2.2-T2V-A14B-Diffusers", "Wan2.2-I2V-A14B-Diffusers", "Wan2.2-TI2V-5B-Diffusers"
TI2V_SHAPES: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 48,
    "out_channels": 48, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 14336, "num_layers": 30}
TI2V_SMALL = TI2V_SHAPES | {"num_attention_heads": 4, "attention_head_dim": 32, "text_dim": 64, "ffn_dim": 256,
                            "num_layers": 3}
SHARD_BYTES = 9.5e9
PATCH_EMBEDDING = "patch_embedding.weight"
CAPTIONS = ("抓钳抓取组织", "电凝钩切割血管", "吸引清理术野", "剪刀剪断组织")
CLIPS, CLIP_FRAMES = 8, 90


def make(folder: Path, device: str, layers: int = 40) -> Iterator[str]:
    """Write everything below `folder`; yields what it has written. About 70 GB with 40 layers."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from random_base import write_clip_model

    from lapwan.tiny.model import tiny_folder

    embedded, t2v, i2v = tiny_folder("t2v"), folder / T2V, folder / I2V
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(embedded / part, t2v / part)
    index = json.loads((embedded / "model_index.json").read_text()) | {"boundary_ratio": 0.875}
    (t2v / "model_index.json").write_text(json.dumps(index))
    scheduler = t2v / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"flow_shift": 3.0}))
    torch.manual_seed(0)
    AutoencoderKLWan().save_pretrained(t2v / "vae")
    write_clip_model(folder / "clip")
    yield "VAE and CLIP"
    _write_text_encoder(t2v / "text_encoder", device, layers=24 * layers // 40 or 1)
    yield "umT5-XXL"
    shapes = {"patch_size": (1, 2, 2), "num_attention_heads": 40, "attention_head_dim": 128, "out_channels": 16,
              "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": layers}
    for seed, part in enumerate(("transformer", "transformer_2")):
        with torch.device("meta"):
            transformer = WanTransformer3DModel(in_channels=16, **shapes)
        transformer.save_config(t2v / part)
        _write_shards(t2v / part, _weights(transformer, device, seed), "diffusion_pytorch_model")
        yield part
    _write_i2v(t2v, i2v, device)
    # For extraction: another transformer under the name of the high-noise one, as a full fine-tune of it would be.
    shutil.copytree(t2v / "transformer_2", folder / "tuned" / "transformer", copy_function=os.link)
    _write_clips(folder / "clips", CLIPS, CLIP_FRAMES, 16, (480, 854))
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    yield "image-to-video model, clips and prompts"


def make_5b(folder: Path, device: str, small: bool = False) -> Iterator[str]:
    """TI2V-5B's folder and four clips of 24 frames a second; yields what it has written. 24 GB unless `small`."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    from lapwan.models.original_layout import WAN22_LATENTS_MEAN, WAN22_LATENTS_STD
    from lapwan.tiny.model import tiny_folder

    embedded, model = tiny_folder("t2v"), folder / TI2V
    folder.mkdir(parents=True, exist_ok=True)
    _write_clips(folder / "clips", 4, 21 if small else 125, 24, (64, 96) if small else (480, 854))
    yield "clips"
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(embedded / part, model / part)
    index = json.loads((embedded / "model_index.json").read_text())
    index |= {"boundary_ratio": None, "transformer_2": [None, None], "expand_timesteps": True}
    (model / "model_index.json").write_text(json.dumps(index))
    scheduler = model / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"flow_shift": 5.0}))
    torch.manual_seed(0)
    widths = {"base_dim": 8, "decoder_base_dim": 8} if small else {"base_dim": 160, "decoder_base_dim": 256}
    with torch.device(device):
        vae = AutoencoderKLWan(
            **widths, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
            scale_factor_spatial=16, latents_mean=list(WAN22_LATENTS_MEAN), latents_std=list(WAN22_LATENTS_STD))
    vae.cpu().save_pretrained(model / "vae")
    yield "VAE"
    _write_text_encoder(model / "text_encoder", device, layers=1 if small else 24, small=small)
    yield "umT5-XXL"
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**(TI2V_SMALL if small else TI2V_SHAPES))
    transformer.save_config(model / "transformer")
    _write_shards(model / "transformer", _weights(transformer, device, seed=1), "diffusion_pytorch_model")
    yield "transformer"


def _weights(module: torch.nn.Module, device: str, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter in bf16, of the variance that keeps activations at their size; norms are one."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
            yield name, torch.ones(parameter.shape, dtype=torch.bfloat16)
            continue
        scale = 0.02 if parameter.dim() < 2 else math.prod(parameter.shape[1:]) ** -0.5
        drawn = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.bfloat16)
        yield name, (drawn * scale).cpu()


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], stem: str) -> None:
    """Files of at most about SHARD_BYTES with an index; the patch embedding is a file of its own (see `_write_i2v`)."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[list[str]] = []
    waiting: dict[str, torch.Tensor] = {}

    def write(part: dict[str, torch.Tensor]) -> None:
        save_file(part, folder / f"{len(files)}.part", metadata={"format": "pt"})
        files.append(list(part))

    for name, tensor in tensors:
        if name == PATCH_EMBEDDING:
            write({name: tensor})
            continue
        waiting[name] = tensor
        if sum(t.numel() * t.element_size() for t in waiting.values()) > SHARD_BYTES:
            write(waiting)
            waiting = {}
    if waiting:
        write(waiting)
    weight_map, total = {}, 0
    for number, names in enumerate(files):
        name = f"{stem}-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
        total += (folder / name).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _write_text_encoder(folder: Path, device: str, layers: int, small: bool = False) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    width, inner, heads = (64, 128, 4) if small else (4096, 10240, 64)
    config = UMT5Config(
        vocab_size=256384, d_model=width, d_kv=width // heads, d_ff=inner, num_layers=layers, num_heads=heads,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, tie_word_embeddings=False)
    with torch.device("meta"):
        encoder = UMT5EncoderModel(config)
    config.architectures = ["UMT5EncoderModel"]
    config.save_pretrained(folder)
    _write_shards(folder, _weights(encoder, device, seed=7), "model")


def _write_i2v(t2v: Path, i2v: Path, device: str) -> None:
    """The same weights behind a patch embedding for 36 channels: hard links but for that file."""
    shutil.copytree(t2v, i2v, copy_function=os.link)
    index = i2v / "model_index.json"
    changed = json.loads(index.read_text()) | {"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9}
    index.unlink()
    index.write_text(json.dumps(changed))
    for part in ("transformer", "transformer_2"):
        config = i2v / part / "config.json"
        changed = json.loads(config.read_text()) | {"in_channels": 36}
        config.unlink()
        config.write_text(json.dumps(changed))
        index = i2v / part / "diffusion_pytorch_model.safetensors.index.json"
        shard = i2v / part / json.loads(index.read_text())["weight_map"][PATCH_EMBEDDING]
        shard.unlink()
        generator = torch.Generator(device).manual_seed(3)
        weight = torch.randn(5120, 36, 1, 2, 2, generator=generator, device=device, dtype=torch.bfloat16) / 12
        save_file({PATCH_EMBEDDING: weight.cpu()}, shard, metadata={"format": "pt"})


def _write_clips(folder: Path, count: int, frames: int, fps: int, size: tuple[int, int]) -> None:
    """Waves with a box that moves, and a first image; each clip in a process of its own."""
    folder.mkdir()
    with ProcessPoolExecutor(min(count, os.cpu_count() or 1)) as pool:
        list(pool.map(partial(_write_clip, folder, frames, fps, size), range(count)))
    rows = [{"video_path": f"c{clip}.mp4", "caption": CAPTIONS[clip % len(CAPTIONS)], "duration": frames / fps}
            for clip in range(count)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "clips.jsonl").write_text(text, encoding="utf-8")


def _write_clip(folder: Path, frames: int, fps: int, size: tuple[int, int], clip: int) -> None:
    import av

    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    with av.open(str(folder / f"c{clip}.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(frames):
            waves = [128 + 90 * np.sin(x / (20 + 5 * clip) + t / 6), 128 + 90 * np.cos(y / 31 - t / 9)]
            image = np.stack([*waves, np.full(x.shape, 90.0)], -1)
            left = (t * 7) % (width * 4 // 5)
            image[height // 2 - height // 12:height // 2 + height // 12, left:left + width // 9] = 255 - 20 * clip
            frame = av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")
            if clip == t == 0:
                frame.to_image().save(folder / "first.png")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
