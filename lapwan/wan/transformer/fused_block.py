"""One block without gradients on a GPU: `block_forward`'s function, with what stands between products and attention in
kernels of ours (see `kernels`). A norm gives its result in fp8 where all that reads it multiplies in fp8.

Shapes: B samples, N tokens, D width, R rows of modulation (1, or one a sample).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapwan.lora.layer import project
from lapwan.wan.transformer import kernels
from lapwan.wan.transformer.attention import after_gelu, attend, attend_tokens, feed_forward, multiplies_fp8
from lapwan.wan.transformer.context_parallel import TokenShards


def serves(block: Any, x_BND: Tensor, table_BK6D: Tensor) -> bool:
    """Whether a block whose tokens share a row of modulation can run so: no graph, a GPU in bf16, norms as Wan's."""
    if not (kernels.HAS_TRITON and kernels.serves(x_BND)):
        return False
    norms = (block.norm1.weight is None, block.norm3.weight is None, getattr(block.norm2, "weight", None) is not None)
    return all(norms) and table_BK6D.shape[1] == 1 and x_BND.shape[0] % table_BK6D.shape[0] == 0


@dataclass(frozen=True)
class Rows:
    """All samples' tokens [B·N, D]: as they are, or as e4m3 codes with a scale each."""

    plain: Tensor | None
    codes: tuple[Tensor, Tensor] | None
    shape: torch.Size  # [B, N, D]

    def through(self, layers: Sequence[Any], dtype: torch.dtype) -> list[Tensor]:
        """Each Linear's output, [B, N, O]."""
        if self.codes is None:
            assert self.plain is not None
            return project(layers, self.plain.view(self.shape))
        return [torch.unflatten(layer.multiply(*self.codes, dtype), 0, self.shape[:-1]) for layer in layers]


def rows_of(x_BND: Tensor, layers: Sequence[Any]) -> Rows:
    """Attention's output for the Linears that read it."""
    flat = x_BND.flatten(0, 1)
    if multiplies_fp8(layers, flat.device):
        return Rows(None, kernels.quantise_rows(flat), x_BND.shape)
    return Rows(flat, None, x_BND.shape)


def normed(
    x_BND: Tensor, mul_RD: Tensor, add_RD: Tensor, eps: float, layers: Sequence[Any], out_BND: Tensor | None = None,
    gate_RD: Tensor | None = None,
) -> tuple[Tensor, Rows]:
    """h = x + out · gate and LayerNorm(h) · mul + add, for the Linears that read it."""
    eight = multiplies_fp8(layers, x_BND.device)
    out_ND = None if out_BND is None else out_BND.flatten(0, 1)
    found = kernels.add_norm(x_BND.flatten(0, 1), out_ND, gate_RD, mul_RD, add_RD, eps, eight)
    h_BND = x_BND if out_BND is None else found[0].view(x_BND.shape)
    codes = (found[-2], found[-1]) if eight else None
    return h_BND, Rows(None if eight else found[-1], codes, x_BND.shape)


def rms_heads(attention: Any, norm: Any, x_BND: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """RMSNorm, with rope where there is one, as heads [B, N, H, d]."""
    cos, sin = (None, None) if rope is None else (table.flatten(0, 1) for table in rope)
    y = kernels.rms_rotate(x_BND.flatten(0, 1), norm.weight, cos, sin, norm.eps)
    return torch.unflatten(y.view(x_BND.shape), -1, (attention.heads, -1))


def _through_out(attention: Any, attended_BND: Tensor) -> Tensor:
    last = [attention.to_out[0]]
    [out] = rows_of(attended_BND, last).through(last, attended_BND.dtype)
    return out


# Each part is a function, so that what it made is let go of when it ends.
def _self_attention(
    attention: Any, given: Rows, layers: Sequence[Any], dtype: torch.dtype, rope: tuple[Tensor, Tensor],
    split: TokenShards | None,
) -> Tensor:
    q, k, v = given.through(layers, dtype)
    q = rms_heads(attention, attention.norm_q, q, rope)
    k = rms_heads(attention, attention.norm_k, k, rope)
    return _through_out(attention, attend_tokens(q, k, torch.unflatten(v, -1, (attention.heads, -1)), split))


def _cross_attention(
    attention: Any, given: Rows, dtype: torch.dtype, keys_values: tuple[Tensor, Tensor], bias: Tensor | None
) -> Tensor:
    [q] = given.through([attention.to_q], dtype)
    return _through_out(attention, attend(rms_heads(attention, attention.norm_q, q), *keys_values, bias))


def _feed_forward(ffn: Any, given: Rows, dtype: torch.dtype) -> Tensor:
    if given.plain is not None:
        return feed_forward(ffn, given.plain.view(given.shape))
    return after_gelu(ffn.net[2], given.through([ffn.net[0].proj], dtype)[0])


def forward(
    block: Any, x_BND: Tensor, keys_values: tuple[Tensor, Tensor], table_BK6D: Tensor, rope: tuple[Tensor, Tensor],
    text_bias: Tensor | None, split: TokenShards | None,
) -> Tensor:
    """One block; arguments as `block_forward` has them, with the modulation in its table (K = 1)."""
    dtype, own, text, norm2 = x_BND.dtype, block.attn1, block.attn2, block.norm2
    shift1, scale1, gate1, shift2, scale2, gate2 = (part.squeeze(1) for part in table_BK6D.unbind(2))
    layers = [own.to_q, own.to_k, own.to_v]
    _, given = normed(x_BND, 1 + scale1, shift1, block.norm1.eps, layers)
    x_BND, given = normed(
        x_BND, norm2.weight[None], norm2.bias[None], norm2.eps, [text.to_q],
        _self_attention(own, given, layers, dtype, rope, split), gate1)
    x_BND, given = normed(
        x_BND, 1 + scale2, shift2, block.norm3.eps, [block.ffn.net[0].proj],
        _cross_attention(text, given, dtype, keys_values, text_bias))
    out = _feed_forward(block.ffn, given, dtype)
    added: Tensor = kernels.add_gated(x_BND.flatten(0, 1), out.flatten(0, 1), gate2)
    return added.view(x_BND.shape)
