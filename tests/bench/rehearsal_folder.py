"""The models and clips of the rehearsal: A14B's sizes in the released layout, random weights of a seed."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "net"))

T2V, I2V = "Wan2.2-T2V-A14B-Diffusers", "Wan2.2-I2V-A14B-Diffusers"
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
    _write_clips(folder / "clips")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    yield "image-to-video model, clips and prompts"


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


def _write_text_encoder(folder: Path, device: str, layers: int) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=layers, num_heads=64,
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


def _write_clips(folder: Path) -> None:
    """Waves with a box that moves, 480x854, 16 frames a second, longer than 81 frames; and a first image."""
    import av

    folder.mkdir()
    y, x = np.mgrid[0:480, 0:854]
    rows = []
    for clip in range(CLIPS):
        with av.open(str(folder / f"c{clip}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=16)
            stream.width, stream.height, stream.pix_fmt = 854, 480, "yuv420p"
            for t in range(CLIP_FRAMES):
                waves = [128 + 90 * np.sin(x / (20 + 5 * clip) + t / 6), 128 + 90 * np.cos(y / 31 - t / 9)]
                image = np.stack([*waves, np.full(x.shape, 90.0)], -1)
                left = (t * 7) % 700
                image[200:280, left:left + 90] = 255 - 20 * clip
                frame = av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")
                if clip == t == 0:
                    frame.to_image().save(folder / "first.png")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        rows.append({"video_path": f"c{clip}.mp4", "caption": CAPTIONS[clip % len(CAPTIONS)], "duration": 5})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "clips.jsonl").write_text(text, encoding="utf-8")
