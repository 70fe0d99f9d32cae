"""The fused block: `block_forward` without gradients on a GPU, with fused kernels between products and attention.

The kernels are in `kernels`. A norm writes its result in fp8 if every Linear that reads it multiplies in fp8.

Shapes: B samples, N tokens, D width, R rows of modulation (1, or one per sample).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapwan.lora.layer import project
from lapwan.wan.transformer import kernels
from lapwan.wan.transformer.attention import accept_fp8, attend, attend_tokens, feed_forward, gelu_linear
from lapwan.wan.transformer.context_parallel import TokenShards


def supports(block: Any, x_BND: Tensor, table_BK6D: Tensor) -> bool:
    """Whether the fused path applies: no graph, bf16 on a GPU, Wan's norms, one row of modulation for all tokens."""
    if not (kernels.HAS_TRITON and kernels.supports(x_BND)):
        return False
    norms = (block.norm1.weight is None, block.norm3.weight is None, getattr(block.norm2, "weight", None) is not None)
    return all(norms) and table_BK6D.shape[1] == 1 and x_BND.shape[0] % table_BK6D.shape[0] == 0


@dataclass(frozen=True)
class LinearInput:
    """All samples' tokens [B·N, D] as input of Linears: unquantised, or as e4m3 codes with a scale per token."""

    plain: Tensor | None
    codes: tuple[Tensor, Tensor] | None
    shape: torch.Size  # [B, N, D]

    def through(self, layers: Sequence[Any], dtype: torch.dtype) -> list[Tensor]:
        """Each Linear's output, [B, N, O]."""
        if self.codes is None:
            assert self.plain is not None
            return project(layers, self.plain.view(self.shape))
        return [torch.unflatten(layer.multiply(*self.codes, dtype), 0, self.shape[:-1]) for layer in layers]


def linear_input(x_BND: Tensor, layers: Sequence[Any]) -> LinearInput:
    """Attention's output as input of the Linears that read it."""
    x_ND = x_BND.flatten(0, 1)
    if accept_fp8(layers, x_ND.device):
        return LinearInput(None, kernels.quantise_rows(x_ND), x_BND.shape)
    return LinearInput(x_ND, None, x_BND.shape)


def add_norm(
    x_BND: Tensor, mul_RD: Tensor, add_RD: Tensor, eps: float, layers: Sequence[Any], out_BND: Tensor | None = None,
    gate_RD: Tensor | None = None,
) -> tuple[Tensor, LinearInput]:
    """h = x + out · gate, and LayerNorm(h) · mul + add as input of the Linears that read it."""
    to_fp8 = accept_fp8(layers, x_BND.device)
    out_ND = None if out_BND is None else out_BND.flatten(0, 1)
    outputs = kernels.add_norm(x_BND.flatten(0, 1), out_ND, gate_RD, mul_RD, add_RD, eps, to_fp8)
    h_BND = x_BND if out_BND is None else outputs[0].view(x_BND.shape)
    codes = (outputs[-2], outputs[-1]) if to_fp8 else None
    return h_BND, LinearInput(None if to_fp8 else outputs[-1], codes, x_BND.shape)


def rms_heads(attention: Any, norm: Any, x_BND: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """RMSNorm and, if given, rope; as heads [B, N, H, d]."""
    cos, sin = (None, None) if rope is None else (table.flatten(0, 1) for table in rope)
    y = kernels.rms_rotate(x_BND.flatten(0, 1), norm.weight, cos, sin, norm.eps)
    return torch.unflatten(y.view(x_BND.shape), -1, (attention.heads, -1))


def _output_projection(attention: Any, attended_BND: Tensor) -> Tensor:
    layers = [attention.to_out[0]]
    [out] = linear_input(attended_BND, layers).through(layers, attended_BND.dtype)
    return out


# Each part is a function, so that its intermediate tensors are freed when it returns.
def _self_attention(
    attention: Any, y: LinearInput, layers: Sequence[Any], dtype: torch.dtype, rope: tuple[Tensor, Tensor],
    shards: TokenShards | None,
) -> Tensor:
    q, k, v = y.through(layers, dtype)
    q = rms_heads(attention, attention.norm_q, q, rope)
    k = rms_heads(attention, attention.norm_k, k, rope)
    v = torch.unflatten(v, -1, (attention.heads, -1))
    return _output_projection(attention, attend_tokens(q, k, v, shards))


def _cross_attention(
    attention: Any, y: LinearInput, dtype: torch.dtype, keys_values: tuple[Tensor, Tensor], bias: Tensor | None
) -> Tensor:
    [q] = y.through([attention.to_q], dtype)
    return _output_projection(attention, attend(rms_heads(attention, attention.norm_q, q), *keys_values, bias))


def _feed_forward(ffn: Any, y: LinearInput, dtype: torch.dtype) -> Tensor:
    if y.plain is not None:
        return feed_forward(ffn, y.plain.view(y.shape))
    return gelu_linear(ffn.net[2], y.through([ffn.net[0].proj], dtype)[0])


def forward(
    block: Any, x_BND: Tensor, keys_values: tuple[Tensor, Tensor], table_BK6D: Tensor, rope: tuple[Tensor, Tensor],
    text_bias: Tensor | None, shards: TokenShards | None,
) -> Tensor:
    """One block; arguments as in `block_forward`, with the modulation already added to the block's table (K = 1)."""
    dtype, attn1, attn2, norm2 = x_BND.dtype, block.attn1, block.attn2, block.norm2
    shift1, scale1, gate1, shift2, scale2, gate2 = (part.squeeze(1) for part in table_BK6D.unbind(2))
    layers = [attn1.to_q, attn1.to_k, attn1.to_v]
    _, y = add_norm(x_BND, 1 + scale1, shift1, block.norm1.eps, layers)
    x_BND, y = add_norm(
        x_BND, norm2.weight[None], norm2.bias[None], norm2.eps, [attn2.to_q],
        _self_attention(attn1, y, layers, dtype, rope, shards), gate1)
    x_BND, y = add_norm(
        x_BND, 1 + scale2, shift2, block.norm3.eps, [block.ffn.net[0].proj],
        _cross_attention(attn2, y, dtype, keys_values, text_bias))
    out = _feed_forward(block.ffn, y, dtype)
    added: Tensor = kernels.add_gated(x_BND.flatten(0, 1), out.flatten(0, 1), gate2)
    return added.view(x_BND.shape)
