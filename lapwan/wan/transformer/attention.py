"""Attention and the feed-forward, shared by the eager block (`block`) and the fused block (`fused_block`).

Shapes: B samples, N tokens, L keys, H heads of d, D width, F width of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lapwan.wan.quantise.linears import Fp8Linear, fp8_in_hardware
from lapwan.wan.transformer import kernels
from lapwan.wan.transformer.context_parallel import TokenShards


def attend(q_BNHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + bias) v, as [B, N, D]."""
    out = F.scaled_dot_product_attention(
        q_BNHd.transpose(1, 2), k_BLHd.transpose(1, 2), v_BLHd.transpose(1, 2), attn_mask=bias)
    return out.transpose(1, 2).flatten(2)


def attend_tokens(q_BNHd: Tensor, k_BNHd: Tensor, v_BNHd: Tensor, shards: TokenShards | None) -> Tensor:
    """Self-attention [B, N, D]; with `shards` over the tokens of all processes."""
    if shards is None:
        return attend(q_BNHd, k_BNHd, v_BNHd)
    # q, k and v in one exchange.
    q, k, v = shards.to_heads(torch.cat([q_BNHd, k_BNHd, v_BNHd])).chunk(3)
    return shards.to_tokens(torch.unflatten(attend(q, k, v), -1, (q.shape[2], -1))).flatten(2)


def accept_fp8(layers: Sequence[Any], device: torch.device) -> bool:
    """Whether all of these Linears multiply fp8 inputs in hardware."""
    return all(type(layer) is Fp8Linear for layer in layers) and fp8_in_hardware(device)


def gelu_linear(second: Any, hidden_BNF: Tensor) -> Tensor:
    """W2 · gelu(hidden), with the tanh approximation."""
    out: Tensor
    if kernels.supports(hidden_BNF) and kernels.HAS_TRITON and accept_fp8([second], hidden_BNF.device):
        codes, scale = kernels.gelu_quantise(hidden_BNF.flatten(0, -2))
        out = torch.unflatten(second.multiply(codes, scale, hidden_BNF.dtype), 0, hidden_BNF.shape[:-1])
    else:
        out = second(F.gelu(hidden_BNF, approximate="tanh"))
    return out


def feed_forward(ffn: Any, y_BND: Tensor) -> Tensor:
    """W2 · gelu(W1 · y)."""
    first, second = ffn.net[0].proj, ffn.net[2]
    if kernels.supports(y_BND) and kernels.plain_linear(first):
        hidden = kernels.linear_gelu(y_BND.flatten(0, -2), first.weight, first.bias)
        out: Tensor = second(torch.unflatten(hidden, 0, y_BND.shape[:-1]))
        return out
    return gelu_linear(second, first(y_BND))
