"""One block of Wan's transformer over diffusers' modules, with the same result as theirs.

What differs: the adapters of q, k and v share one down-projection; cross-attention takes cached keys and values;
modulation is given as a few rows and each token's row index; rope is two tables without a gather; what diffusers
computes in fp32 is computed in the latents' dtype if that is wider. On a GPU without a graph `fused_block` takes over.
Shapes: B samples, N tokens, D width, H heads, d head width, L text tokens, K rows of modulation (1, or as many as the
sequence has timesteps).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lapwan.lora.layer import project
from lapwan.wan.transformer import fused_block
from lapwan.wan.transformer.attention import attend, attend_tokens, feed_forward
from lapwan.wan.transformer.context_parallel import TokenShards
from lapwan.wan.transformer.kernels import rotate

Rope = tuple[Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]
BlockFunction = Callable[..., Tensor]


def widened(x: Tensor) -> Tensor:
    """fp32, or x's own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(module: Any, x_wide: Tensor) -> Tensor:
    """diffusers' FP32LayerNorm over the last dimension, left in the wide dtype."""
    weight = None if module.weight is None else module.weight.to(x_wide.dtype)
    bias = None if module.bias is None else module.bias.to(x_wide.dtype)
    return F.layer_norm(x_wide, (x_wide.shape[-1],), weight, bias, module.eps)


def modulated(module: Any, x_wide: Tensor, scale_BKD: Tensor, shift_BKD: Tensor) -> Tensor:
    """norm(x)·(1 + scale) + shift; one kernel if all tokens share a row of modulation."""
    if scale_BKD.shape[:2] == (1, 1) and module.weight is None:
        width = (x_wide.shape[-1],)
        return F.layer_norm(x_wide, width, (1 + scale_BKD).flatten(), shift_BKD.flatten(), module.eps)
    return layer_norm(module, x_wide) * (1 + scale_BKD) + shift_BKD


def _normalised_heads(attention: Any, norm: Any, x_BND: Tensor) -> Tensor:
    normed = F.rms_norm(x_BND, (x_BND.shape[-1],), norm.weight.to(x_BND.dtype), norm.eps)
    return torch.unflatten(normed, -1, (attention.heads, -1))


def self_attention(attention: Any, y_BND: Tensor, rope: Rope, shards: TokenShards | None = None) -> Tensor:
    """Attention of the video tokens over themselves; with `shards` over those of all processes."""
    q, k, v = project([attention.to_q, attention.to_k, attention.to_v], y_BND)
    q = rotate(_normalised_heads(attention, attention.norm_q, q), rope)
    k = rotate(_normalised_heads(attention, attention.norm_k, k), rope)
    v = torch.unflatten(v, -1, (attention.heads, -1))
    out: Tensor = attention.to_out[0](attend_tokens(q, k, v, shards))
    return out


def text_keys_values(attention: Any, text_BLD: Tensor) -> KeysValues:
    """Cross-attention's keys and values [B, L, H, d]: the same at every step of a generation."""
    k, v = project([attention.to_k, attention.to_v], text_BLD)
    return _normalised_heads(attention, attention.norm_k, k), torch.unflatten(v, -1, (attention.heads, -1))


def cross_attention(attention: Any, y_BND: Tensor, keys_values: KeysValues, bias: Tensor | None = None) -> Tensor:
    """Attention over the text; `bias` is added to the logits (see `prompt`)."""
    q = _normalised_heads(attention, attention.norm_q, attention.to_q(y_BND))
    out: Tensor = attention.to_out[0](attend(q, *keys_values, bias))
    return out


def block_forward(
    block: Any, x_BND: Tensor, text_BLD: Tensor | None, keys_values: KeysValues | None, modulation_BK6D: Tensor,
    row_of_token_N: Tensor | None, rope: Rope, text_bias: Tensor | None = None, shards: TokenShards | None = None,
) -> Tensor:
    """One block: self-attention, cross-attention over the text, feed-forward.

    Args:
        block: diffusers' WanTransformerBlock, whose Linears may be any module that maps [..., I] to [..., O].
        text_BLD: embedded text; None if `keys_values` of this block are given.
        row_of_token_N: each token's row of the modulation; None: K is 1 or N.
        text_bias: [B, 1, 1, L], added to the logits of the text.
        shards: set if the tokens, with their rope and rows of modulation, are this process's shard of a sequence.
    """
    dtype = x_BND.dtype
    wide = torch.promote_types(dtype, torch.float32)

    table = block.scale_shift_table.unsqueeze(0) + modulation_BK6D.to(wide)
    if keys_values is None:
        assert text_BLD is not None
        keys_values = text_keys_values(block.attn2, text_BLD)
    if row_of_token_N is None and fused_block.supports(block, x_BND, table):
        return fused_block.forward(block, x_BND, keys_values, table, rope, text_bias, shards)

    def per_token(part_BKD: Tensor) -> Tensor:
        return part_BKD if row_of_token_N is None else part_BKD.index_select(1, row_of_token_N)

    shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(2)

    y = modulated(block.norm1, x_BND.to(wide), per_token(scale1), per_token(shift1))
    x_BND = (x_BND.to(wide) + self_attention(block.attn1, y.to(dtype), rope, shards) * per_token(gate1)).to(dtype)

    y = x_BND if isinstance(block.norm2, torch.nn.Identity) else layer_norm(block.norm2, x_BND.to(wide)).to(dtype)
    x_BND = x_BND + cross_attention(block.attn2, y, keys_values, text_bias)

    y = modulated(block.norm3, x_BND.to(wide), per_token(scale2), per_token(shift2))
    return (x_BND.to(wide) + feed_forward(block.ffn, y.to(dtype)).to(wide) * per_token(gate2)).to(dtype)
