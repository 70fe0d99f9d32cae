"""One block of Wan's transformer: diffusers' modules and function, our forward.

What differs from theirs: q, k and v share one down-projection of their adapters, cross-attention takes keys and values
computed before, modulation comes as a few rows and each token's row, rope as two tables without a gather, and what
computes in fp32 computes in the latents' wider dtype where that is wider. Without a graph on a GPU: `fused_block`.
Shapes: B samples, N tokens, D width, H heads, d head width, L text tokens, K rows of modulation (1, or as many as the
sequence has timesteps).
"""

from __future__ import annotations

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


def widened(x: Tensor) -> Tensor:
    """fp32, or x's own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(module: Any, x_wide: Tensor) -> Tensor:
    """diffusers' FP32LayerNorm over the last dimension, left in the wide dtype."""
    weight = None if module.weight is None else module.weight.to(x_wide.dtype)
    bias = None if module.bias is None else module.bias.to(x_wide.dtype)
    return F.layer_norm(x_wide, (x_wide.shape[-1],), weight, bias, module.eps)


def modulated(module: Any, x_wide: Tensor, scale_BKD: Tensor, shift_BKD: Tensor) -> Tensor:
    """norm(x)·(1 + scale) + shift, in one kernel where all tokens share a row of modulation."""
    if scale_BKD.shape[:2] == (1, 1) and module.weight is None:
        width = (x_wide.shape[-1],)
        return F.layer_norm(x_wide, width, (1 + scale_BKD).flatten(), shift_BKD.flatten(), module.eps)
    return layer_norm(module, x_wide) * (1 + scale_BKD) + shift_BKD


def _normalised_heads(attention: Any, norm: Any, x_BND: Tensor) -> Tensor:
    normed = F.rms_norm(x_BND, (x_BND.shape[-1],), norm.weight.to(x_BND.dtype), norm.eps)
    return torch.unflatten(normed, -1, (attention.heads, -1))


def self_attention(attention: Any, y_BND: Tensor, rope: Rope, split: TokenShards | None = None) -> Tensor:
    """Attention of the latents' tokens over themselves; over those of all processes where they are `split`."""
    q, k, v = project([attention.to_q, attention.to_k, attention.to_v], y_BND)
    q = rotate(_normalised_heads(attention, attention.norm_q, q), rope)
    k = rotate(_normalised_heads(attention, attention.norm_k, k), rope)
    v = torch.unflatten(v, -1, (attention.heads, -1))
    out: Tensor = attention.to_out[0](attend_tokens(q, k, v, split))
    return out


def text_keys_values(attention: Any, text_BLD: Tensor) -> KeysValues:
    """Cross-attention's keys and values [B, L, H, d]: the same at every step of a generation."""
    k, v = project([attention.to_k, attention.to_v], text_BLD)
    return _normalised_heads(attention, attention.norm_k, k), torch.unflatten(v, -1, (attention.heads, -1))


def cross_attention(attention: Any, y_BND: Tensor, keys_values: KeysValues, bias: Tensor | None = None) -> Tensor:
    """Attention over the text; `bias` is added to the logits (see `short_text`)."""
    q = _normalised_heads(attention, attention.norm_q, attention.to_q(y_BND))
    out: Tensor = attention.to_out[0](attend(q, *keys_values, bias))
    return out


def block_forward(
    block: Any, x_BND: Tensor, text_BLD: Tensor | None, keys_values: KeysValues | None, modulation_BK6D: Tensor,
    row_of_token_N: Tensor | None, rope: Rope, text_bias: Tensor | None = None, split: TokenShards | None = None,
) -> Tensor:
    """One block.

    Args:
        block: diffusers' WanTransformerBlock, whose Linears may be any module that maps [..., I] to [..., O].
        text_BLD: embedded text; or None, with `keys_values` of this block.
        row_of_token_N: each token's row of the modulation; None: all take the only one, or K = N.
        text_bias: [B, 1, 1, L], added to the text's logits.
        split: the tokens, with their rope and rows of modulation, are this process's part of a sequence.
    """
    dtype = x_BND.dtype
    wide = torch.promote_types(dtype, torch.float32)

    table = block.scale_shift_table.unsqueeze(0) + modulation_BK6D.to(wide)
    if keys_values is None:
        assert text_BLD is not None
        keys_values = text_keys_values(block.attn2, text_BLD)
    if row_of_token_N is None and fused_block.serves(block, x_BND, table):
        return fused_block.forward(block, x_BND, keys_values, table, rope, text_bias, split)

    def of_tokens(part_BKD: Tensor) -> Tensor:
        return part_BKD if row_of_token_N is None else part_BKD.index_select(1, row_of_token_N)

    shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(2)

    y = modulated(block.norm1, x_BND.to(wide), of_tokens(scale1), of_tokens(shift1))
    x_BND = (x_BND.to(wide) + self_attention(block.attn1, y.to(dtype), rope, split) * of_tokens(gate1)).to(dtype)

    y = x_BND if isinstance(block.norm2, torch.nn.Identity) else layer_norm(block.norm2, x_BND.to(wide)).to(dtype)
    x_BND = x_BND + cross_attention(block.attn2, y, keys_values, text_bias)

    y = modulated(block.norm3, x_BND.to(wide), of_tokens(scale2), of_tokens(shift2))
    return (x_BND.to(wide) + feed_forward(block.ffn, y.to(dtype)).to(wide) * of_tokens(gate2)).to(dtype)
