"""CLIP's two towers in plain torch, on tensors named as open_clip names them: nothing of open_clip or transformers.

Written from the papers: Radford et al. (arXiv 2103.00020) for the pair, Dosovitskiy et al. (arXiv 2010.11929) for the
vision transformer, GELU by its definition x·Φ(x), attention as softmax(q·kᵀ/√d)·v over heads cut from the width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def _norm(t: Tensors, name: str, x: Tensor) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = (x - mean).square().mean(dim=-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]


def _attention(t: Tensors, name: str, x: Tensor, heads: int, causal: bool) -> Tensor:
    batch, tokens, width = x.shape
    size = width // heads
    stacked = x @ t[f"{name}.in_proj_weight"].T + t[f"{name}.in_proj_bias"]
    q, k, v = (stacked[..., i * width:(i + 1) * width].reshape(batch, tokens, heads, size).transpose(1, 2)
               for i in range(3))
    logits = q @ k.transpose(2, 3) / math.sqrt(size)
    if causal:
        logits = logits + torch.full((tokens, tokens), -math.inf).triu(1)
    mixed = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
    return mixed @ t[f"{name}.out_proj.weight"].T + t[f"{name}.out_proj.bias"]


def _tower(t: Tensors, prefix: str, x: Tensor, heads: int, causal: bool) -> Tensor:
    layers = 1 + max(int(n.removeprefix(prefix).split(".")[0]) for n in t if n.startswith(prefix))
    for layer in range(layers):
        block = f"{prefix}{layer}"
        x = x + _attention(t, f"{block}.attn", _norm(t, f"{block}.ln_1", x), heads, causal)
        inner = _norm(t, f"{block}.ln_2", x) @ t[f"{block}.mlp.c_fc.weight"].T + t[f"{block}.mlp.c_fc.bias"]
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + inner @ t[f"{block}.mlp.c_proj.weight"].T + t[f"{block}.mlp.c_proj.bias"]
    return x


def image_embedding(t: Tensors, square: Tensor, heads: int) -> Tensor:
    """[B, D] of normalised pixels [B, 3, S, S], not of unit norm."""
    kernel = t["visual.conv1.weight"]
    patch, width = kernel.shape[-1], kernel.shape[0]
    cut = square.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, rows, columns, patch, patch]
    flat = cut.permute(0, 2, 3, 1, 4, 5).reshape(len(square), -1, 3 * patch * patch)
    x = flat @ kernel.reshape(width, -1).T
    x = torch.cat([t["visual.class_embedding"].expand(len(x), 1, width), x], dim=1) + t["visual.positional_embedding"]
    x = _tower(t, "visual.transformer.resblocks.", _norm(t, "visual.ln_pre", x), heads, causal=False)
    return _norm(t, "visual.ln_post", x[:, 0]) @ t["visual.proj"]


def text_embedding(t: Tensors, tokens: Tensor, heads: int) -> Tensor:
    """[N, D] of token ids [N, context], read where the id is highest (the end mark), not of unit norm."""
    x = t["token_embedding.weight"][tokens] + t["positional_embedding"][:tokens.shape[1]]
    x = _norm(t, "ln_final", _tower(t, "transformer.resblocks.", x, heads, causal=True))
    return x[torch.arange(len(x)), tokens.argmax(dim=1)] @ t["text_projection"]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1))
