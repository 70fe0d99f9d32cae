"""Random checkpoints and folders of CLIP's shape, and a tokenizer without a download."""

from __future__ import annotations

import gzip
from itertools import islice, product
from pathlib import Path

import torch
from torch import Tensor

from lapwan.rewards.clip import BPE_FILE
from lapwan.rewards.open_clip import Architecture, Tower

MERGES = ("t h", "th e</w>", "h o", "o k</w>", "r e", "re d</w>")
VOCABULARY = 512 + len(MERGES) + 2
SMALL = Architecture(Tower(32, 2, 2), Tower(24, 3, 4), embed=16, patch=4, image=16, context=77, vocabulary=VOCABULARY)


def write_merges(folder: Path, count: int = len(MERGES)) -> Path:
    """open_clip's file, with few merges, or filled up to `count` with some that no text meets."""
    path = folder / BPE_FILE
    letters = [chr(c) for c in range(0xA1, 0x144) if c != 0xAD]  # as CLIP writes bytes beyond ASCII
    unused = (f"{a} {b}" for a, b in product(letters, letters + [c + "</w>" for c in letters]))
    lines = ("bpe_simple_vocab_16e6.txt#version: 0.2", *MERGES, *islice(unused, count - len(MERGES)))
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path


def random_tensors(shape: Architecture, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor of a checkpoint in open_clip's layout, at random, with widths kept in their scale."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 0.1, around: float = 0.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale + around).to(dtype)

    tensors = {
        "visual.class_embedding": draw(shape.vision.width),
        "visual.positional_embedding": draw((shape.image // shape.patch) ** 2 + 1, shape.vision.width),
        "visual.conv1.weight": draw(shape.vision.width, 3, shape.patch, shape.patch, scale=0.5 / shape.patch),
        "visual.proj": draw(shape.vision.width, shape.embed, scale=shape.vision.width**-0.5),
        "token_embedding.weight": draw(shape.vocabulary, shape.text.width),
        "positional_embedding": draw(shape.context, shape.text.width),
        "text_projection": draw(shape.text.width, shape.embed, scale=shape.text.width**-0.5),
        "logit_scale": torch.tensor(4.6052),
    }
    norms = [(f"visual.{name}", shape.vision.width) for name in ("ln_pre", "ln_post")]
    norms.append(("ln_final", shape.text.width))
    for prefix, tower in (("visual.transformer", shape.vision), ("transformer", shape.text)):
        for layer in range(tower.layers):
            block, width = f"{prefix}.resblocks.{layer}", tower.width
            norms += [(f"{block}.ln_1", width), (f"{block}.ln_2", width)]
            for name, rows, columns in (("attn.in_proj_", 3 * width, width), ("attn.out_proj.", width, width),
                                        ("mlp.c_fc.", 4 * width, width), ("mlp.c_proj.", width, 4 * width)):
                tensors[f"{block}.{name}weight"] = draw(rows, columns, scale=columns**-0.5)
                tensors[f"{block}.{name}bias"] = draw(rows)
    for name, width in norms:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = draw(width, around=1.0), draw(width)
    return tensors


def write_hps(path: Path, shape: Architecture, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A checkpoint wrapped as HPS v2.1's file is; returns its tensors."""
    tensors = random_tensors(shape, dtype)
    torch.save({"epoch": 1, "state_dict": tensors}, path)
    return tensors
