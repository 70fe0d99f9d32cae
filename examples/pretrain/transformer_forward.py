"""Wan's transformer for training: diffusers' function, with the text's zero rows counted instead of computed.

Wan pads text to 512 rows with zeros and attends them all. Zero rows have one key and one value, so n of them act as one
row whose attention logit is raised by ln n: captions of 30 words then cost 31 keys instead of 512.
Shapes: B samples, S latent tokens, L text tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lapwan.models.spec import TEXT_LENGTH

_MASKED_LOGIT = -60.0  # a logit so low that the row has no weight
Block = Callable[[Any, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]


def text_and_bias(hidden_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Features with their padding zeroed and one zero row behind, and the logit of each row [B, 1, 1, L + 1]."""
    mask = mask_BL.bool()
    text = torch.where(mask[..., None], hidden_BLD, 0.0)
    count = torch.log((TEXT_LENGTH - mask.sum(dim=1)).to(text.dtype))
    bias = torch.zeros_like(text[..., 0]).masked_fill(~mask, -math.inf)
    return F.pad(text, (0, 0, 0, 1)), torch.cat([bias, count[:, None]], dim=1)[:, None, None]


def _apply_rope(x_BHSD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    a, b = torch.unflatten(x_BHSD.float(), -1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x_BHSD.dtype)


def _heads(x_BSD: Tensor, heads: int) -> Tensor:
    return torch.unflatten(x_BSD, -1, (heads, -1)).transpose(1, 2)


def _rms_norm(x: Tensor, table: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), table.float(), eps).to(x.dtype)


def _attend(layer: Any, x: Tensor, context: Tensor, bias: Tensor | None, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    q = _heads(_rms_norm(layer.to_q(x), layer.norm_q.weight, layer.norm_q.eps), layer.heads)
    k = _heads(_rms_norm(layer.to_k(context), layer.norm_k.weight, layer.norm_k.eps), layer.heads)
    v = _heads(layer.to_v(context), layer.heads)
    if rope is not None:
        q, k = _apply_rope(q, rope), _apply_rope(k, rope)
    size = q.shape[-1]
    if bias is not None:
        # A logit that belongs to a key is one more component of the key against a 1 in the query: no mask, so that
        # the fast attention kernels take it. They want sizes that are multiples of 8.
        column = (bias.clamp_min(_MASKED_LOGIT) * math.sqrt(size)).to(k.dtype)
        column = column.expand(-1, k.shape[1], -1, -1).transpose(2, 3)
        q = F.pad(F.pad(q, (0, 1), value=1.0), (0, 7))
        k = F.pad(torch.cat([k, column], dim=-1), (0, 7))
        v = F.pad(v, (0, 8))
    out = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(size))[..., :size]
    mixed: Tensor = layer.to_out[0](out.transpose(1, 2).flatten(2))
    return mixed


def block_forward(
    block: Any, x: Tensor, text: Tensor, bias: Tensor, time_B6D: Tensor, rope: tuple[Tensor, Tensor]
) -> Tensor:
    """One block; the residual stream stays in fp32."""
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table + time_B6D.float()).chunk(6, dim=1)
    width = (x.shape[-1],)
    y = F.layer_norm(x, width, eps=block.norm1.eps) * (1 + scale1) + shift1
    x = x + _attend(block.attn1, y, y, None, rope).float() * gate1
    y = F.layer_norm(x, width, block.norm2.weight, block.norm2.bias, block.norm2.eps)
    x = x + _attend(block.attn2, y, text, bias, None).float()
    y = F.layer_norm(x, width, eps=block.norm3.eps) * (1 + scale2) + shift2
    out: Tensor = x + block.ffn(y).float() * gate2
    return out


def rope_tables(model: Any, latents_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [S, head dim / 2]."""
    cos, sin = model.rope(latents_BCTHW)
    return cos[0, :, 0, 0::2].float(), sin[0, :, 0, 1::2].float()


def predict(
    model: Any, x_BCTHW: Tensor, timestep_B: Tensor, text: Tensor, bias: Tensor, rope: tuple[Tensor, Tensor],
    block: Block = block_forward,
) -> Tensor:
    """The velocity in fp32, as `model(x, timestep, text padded to 512)`."""
    batch, _, frames, height, width = x_BCTHW.shape
    hidden = model.patch_embedding(x_BCTHW).flatten(2).transpose(1, 2).float()
    embedder = model.condition_embedder
    with torch.autocast(x_BCTHW.device.type, enabled=False):  # sines of timesteps up to 1000 need fp32
        time = embedder.time_embedder(embedder.timesteps_proj(timestep_B.float()))
    modulation = embedder.time_proj(F.silu(time)).unflatten(1, (6, -1))
    words = embedder.text_embedder(text)
    for layer in model.blocks:
        hidden = block(layer, hidden, words, bias, modulation, rope)
    shift, scale = (model.scale_shift_table + time[:, None]).chunk(2, dim=1)
    hidden = F.layer_norm(hidden, (hidden.shape[-1],), eps=model.norm_out.eps) * (1 + scale) + shift
    out = model.proj_out(hidden).float()
    out = out.reshape(batch, frames, height // 2, width // 2, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5)
    velocity: Tensor = out.reshape(batch, -1, frames, height, width)
    return velocity
