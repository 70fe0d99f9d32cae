"""One block of Wan's transformer over diffusers' modules, with the same result as theirs: eager and fused.

What differs: the adapters of q, k and v share one down-projection; cross-attention takes cached keys and values;
modulation is given as a few rows, each for a run of consecutive tokens, and never expanded to all of them; rope is two
tables without a gather; what diffusers computes in fp32 is computed in the latents' dtype if that is wider. On a GPU
without a graph the fused block takes over, with `kernels` between products and attention: a norm writes fp8 if every
Linear that reads it multiplies in fp8.
Shapes: B samples, N tokens, D width, H heads, d head width, F width of the feed-forward, L text tokens, K rows of
modulation (1, or as many as the sequence has timesteps), R the same rows for all samples (K, or K per sample).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lapwan.lora.layer import project
from lapwan.wan.quantise.linears import Fp8Linear, fp8_in_hardware
from lapwan.wan.transformer import kernels
from lapwan.wan.transformer.context_parallel import TokenShards

Rope = tuple[Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]
BlockFunction = Callable[..., Tensor]


# Attention and the feed-forward, of both blocks


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
    """Whether the fused operations write fp8 for these Linears: all of them multiply in fp8, and so does the device.

    On a CPU, where only tests run the fused operations, their torch forms write fp8 too.
    """
    return all(type(layer) is Fp8Linear for layer in layers) and (device.type == "cpu" or fp8_in_hardware(device))


def gelu_linear(second: Any, hidden_BNF: Tensor, fused: bool) -> Tensor:
    """W2 · gelu(hidden), with the tanh approximation; `fused`: gelu may write fp8."""
    out: Tensor
    if fused and accept_fp8([second], hidden_BNF.device):
        codes, scale = kernels.gelu_quantise(hidden_BNF.flatten(0, -2))
        out = torch.unflatten(second.multiply(codes, scale, hidden_BNF.dtype), 0, hidden_BNF.shape[:-1])
    else:
        out = second(F.gelu(hidden_BNF, approximate="tanh"))
    return out


def feed_forward(ffn: Any, y_BND: Tensor, fused: bool = False) -> Tensor:
    """W2 · gelu(W1 · y); `fused`: by fused operations, also where they are no faster."""
    first, second = ffn.net[0].proj, ffn.net[2]
    supported = fused or kernels.supports(y_BND)
    if supported and kernels.plain_linear(first):
        hidden = kernels.linear_gelu(y_BND.flatten(0, -2), first.weight, first.bias)
        out: Tensor = second(torch.unflatten(hidden, 0, y_BND.shape[:-1]))
        return out
    return gelu_linear(second, first(y_BND), fused or (supported and kernels.TRITON.works))


# The eager block


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


def by_run(
    function: Callable[..., Tensor], counts: tuple[int, ...] | None, tokens: Sequence[Tensor], rows: Sequence[Tensor]
) -> Tensor:
    """function(*tokens, *rows) on each run of consecutive tokens with its row of modulation.

    Rows [B, K, D] are not expanded to the tokens: that would write and keep [B, N, D] in fp32 for each of them.

    Args:
        function: takes tokens [B, n, D] and rows [B, 1, D].
        counts: tokens of each run; None: one call with all tokens, K is 1 or N.
    """
    if counts is None:
        return function(*tokens, *rows)
    pieces = [*(torch.split(x, list(counts), dim=1) for x in tokens), *(torch.split(row, 1, dim=1) for row in rows)]
    return torch.cat([function(*piece) for piece in zip(*pieces, strict=True)], dim=1)


def _normalised_heads(attention: Any, norm: Any, x_BND: Tensor) -> Tensor:
    normed = F.rms_norm(x_BND, (x_BND.shape[-1],), norm.weight.to(x_BND.dtype), norm.eps)
    return torch.unflatten(normed, -1, (attention.heads, -1))


def self_attention(attention: Any, y_BND: Tensor, rope: Rope, shards: TokenShards | None = None) -> Tensor:
    """Attention of the video tokens over themselves; with `shards` over those of all processes."""
    q, k, v = project([attention.to_q, attention.to_k, attention.to_v], y_BND)
    q = kernels.rotate(_normalised_heads(attention, attention.norm_q, q), rope)
    k = kernels.rotate(_normalised_heads(attention, attention.norm_k, k), rope)
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


def eager_block(
    block: Any, x_BND: Tensor, text_BLD: Tensor | None, keys_values: KeysValues | None, modulation_BK6D: Tensor,
    counts: tuple[int, ...] | None, rope: Rope, text_bias: Tensor | None = None, shards: TokenShards | None = None,
) -> Tensor:
    """One block, on any device and in any dtype; arguments as in `block_forward`."""
    dtype = x_BND.dtype
    wide = torch.promote_types(dtype, torch.float32)
    table = _modulation_table(block, x_BND, modulation_BK6D)
    keys_values = _keys_values(block, text_BLD, keys_values)

    def modulate(norm: Any, x: Tensor, scale_BKD: Tensor, shift_BKD: Tensor) -> Tensor:
        return modulated(norm, x.to(wide), scale_BKD, shift_BKD).to(dtype)

    def add(x: Tensor, out: Tensor, gate_BKD: Tensor) -> Tensor:
        return (x.to(wide) + out.to(wide) * gate_BKD).to(dtype)

    shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(2)

    y = by_run(partial(modulate, block.norm1), counts, [x_BND], [scale1, shift1])
    x_BND = by_run(add, counts, [x_BND, self_attention(block.attn1, y, rope, shards)], [gate1])

    y = x_BND if isinstance(block.norm2, torch.nn.Identity) else layer_norm(block.norm2, x_BND.to(wide)).to(dtype)
    x_BND = x_BND + cross_attention(block.attn2, y, keys_values, text_bias)

    y = by_run(partial(modulate, block.norm3), counts, [x_BND], [scale2, shift2])
    return by_run(add, counts, [x_BND, feed_forward(block.ffn, y)], [gate2])


def _modulation_table(block: Any, x_BND: Tensor, modulation_BK6D: Tensor) -> Tensor:
    """Shifts, scales and gates, [B, K, 6, D]."""
    wide = torch.promote_types(x_BND.dtype, torch.float32)
    table: Tensor = block.scale_shift_table.unsqueeze(0) + modulation_BK6D.to(wide)
    return table


def _keys_values(block: Any, text_BLD: Tensor | None, keys_values: KeysValues | None) -> KeysValues:
    if keys_values is not None:
        return keys_values
    assert text_BLD is not None
    return text_keys_values(block.attn2, text_BLD)


# The fused block


@dataclass(frozen=True)
class _LinearInput:
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


def _linear_input(x_BND: Tensor, layers: Sequence[Any]) -> _LinearInput:
    """Attention's output as input of the Linears that read it."""
    x_ND = x_BND.flatten(0, 1)
    if accept_fp8(layers, x_ND.device):
        return _LinearInput(None, kernels.quantise_rows(x_ND), x_BND.shape)
    return _LinearInput(x_ND, None, x_BND.shape)


def _add_norm(
    x_BND: Tensor, mul_RD: Tensor, add_RD: Tensor, eps: float, layers: Sequence[Any], runs: tuple[int, int],
    out_BND: Tensor | None = None, gate_RD: Tensor | None = None,
) -> tuple[Tensor, _LinearInput]:
    """h = x + out · gate, and LayerNorm(h) · mul + add as input of the Linears that read it."""
    to_fp8 = accept_fp8(layers, x_BND.device)
    out_ND = None if out_BND is None else out_BND.flatten(0, 1)
    outputs = kernels.add_norm(x_BND.flatten(0, 1), out_ND, gate_RD, mul_RD, add_RD, eps, to_fp8, *runs)
    h_BND = x_BND if out_BND is None else outputs[0].view(x_BND.shape)
    codes = (outputs[-2], outputs[-1]) if to_fp8 else None
    return h_BND, _LinearInput(None if to_fp8 else outputs[-1], codes, x_BND.shape)


def _rms_heads(attention: Any, norm: Any, x_BND: Tensor, rope: Rope | None = None) -> Tensor:
    """RMSNorm and, if given, rope; as heads [B, N, H, d]."""
    cos, sin = (None, None) if rope is None else (table.flatten(0, 1) for table in rope)
    y = kernels.rms_rotate(x_BND.flatten(0, 1), norm.weight, cos, sin, norm.eps)
    return torch.unflatten(y.view(x_BND.shape), -1, (attention.heads, -1))


def _output_projection(attention: Any, attended_BND: Tensor) -> Tensor:
    layers = [attention.to_out[0]]
    [out] = _linear_input(attended_BND, layers).through(layers, attended_BND.dtype)
    return out


# Each part is a function, so that its intermediate tensors are freed when it returns.
def _fused_self_attention(
    attention: Any, y: _LinearInput, layers: Sequence[Any], dtype: torch.dtype, rope: Rope,
    shards: TokenShards | None,
) -> Tensor:
    q, k, v = y.through(layers, dtype)
    q = _rms_heads(attention, attention.norm_q, q, rope)
    k = _rms_heads(attention, attention.norm_k, k, rope)
    v = torch.unflatten(v, -1, (attention.heads, -1))
    return _output_projection(attention, attend_tokens(q, k, v, shards))


def _fused_cross_attention(
    attention: Any, y: _LinearInput, dtype: torch.dtype, keys_values: KeysValues, bias: Tensor | None
) -> Tensor:
    [q] = y.through([attention.to_q], dtype)
    return _output_projection(attention, attend(_rms_heads(attention, attention.norm_q, q), *keys_values, bias))


def _fused_feed_forward(ffn: Any, y: _LinearInput, dtype: torch.dtype) -> Tensor:
    if y.plain is not None:
        return feed_forward(ffn, y.plain.view(y.shape), fused=True)
    return gelu_linear(ffn.net[2], y.through([ffn.net[0].proj], dtype)[0], fused=True)


def fused_block(
    block: Any, x_BND: Tensor, text_BLD: Tensor | None, keys_values: KeysValues | None, modulation_BK6D: Tensor,
    counts: tuple[int, ...] | None, rope: Rope, text_bias: Tensor | None = None, shards: TokenShards | None = None,
) -> Tensor:
    """One block where `fused_applies`, without a graph; arguments as in `block_forward`."""
    dtype, attn1, attn2, norm2 = x_BND.dtype, block.attn1, block.attn2, block.norm2
    table = _modulation_table(block, x_BND, modulation_BK6D)
    keys_values = _keys_values(block, text_BLD, keys_values)
    shift1, scale1, gate1, shift2, scale2, gate2 = (part.flatten(0, 1) for part in table.unbind(2))
    runs = x_BND.shape[1], 0 if counts is None else counts[0]
    layers = [attn1.to_q, attn1.to_k, attn1.to_v]
    _, y = _add_norm(x_BND, 1 + scale1, shift1, block.norm1.eps, layers, runs)
    x_BND, y = _add_norm(
        x_BND, norm2.weight[None], norm2.bias[None], norm2.eps, [attn2.to_q], runs,
        _fused_self_attention(attn1, y, layers, dtype, rope, shards), gate1)
    x_BND, y = _add_norm(
        x_BND, 1 + scale2, shift2, block.norm3.eps, [block.ffn.net[0].proj], runs,
        _fused_cross_attention(attn2, y, dtype, keys_values, text_bias))
    out = _fused_feed_forward(block.ffn, y, dtype)
    added: Tensor = kernels.add_gated(x_BND.flatten(0, 1), out.flatten(0, 1), gate2, *runs)
    return added.view(x_BND.shape)


# The choice between them


def fused_applies(block: Any, x_BND: Tensor, modulation_BK6D: Tensor, counts: tuple[int, ...] | None) -> bool:
    """Whether the fused block is as good and faster: no graph, bf16 on a GPU, Wan's norms, one row of modulation for
    all tokens of a sample, or one for its first tokens and one for the others."""
    if not kernels.supports(x_BND) or modulation_BK6D.shape[1] != (1 if counts is None else 2):
        return False
    norms = (block.norm1.weight is None, block.norm3.weight is None, getattr(block.norm2, "weight", None) is not None)
    return all(norms) and x_BND.shape[0] % modulation_BK6D.shape[0] == 0


def block_forward(
    block: Any, x_BND: Tensor, text_BLD: Tensor | None, keys_values: KeysValues | None, modulation_BK6D: Tensor,
    counts: tuple[int, ...] | None, rope: Rope, text_bias: Tensor | None = None, shards: TokenShards | None = None,
) -> Tensor:
    """One block: self-attention, cross-attention over the text, feed-forward; fused where that applies.

    Args:
        block: diffusers' WanTransformerBlock, whose Linears may be any module that maps [..., I] to [..., O].
        text_BLD: embedded text; None if `keys_values` of this block are given.
        counts: how many consecutive tokens have each row of the modulation; None: K is 1 or N.
        text_bias: [B, 1, 1, L], added to the logits of the text.
        shards: set if the tokens, with their rope and rows of modulation, are this process's shard of a sequence.
    """
    if kernels.TRITON.works and fused_applies(block, x_BND, modulation_BK6D, counts):
        return fused_block(
            block, x_BND, text_BLD, keys_values, modulation_BK6D, counts, rope, text_bias, shards)
    return eager_block(
        block, x_BND, text_BLD, keys_values, modulation_BK6D, counts, rope, text_bias, shards)
