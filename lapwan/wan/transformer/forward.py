"""The whole transformer: diffusers' modules and function, without what a run never needs.

Blocks before the first trained one run without a graph, exactly: nothing before them can receive a gradient.
Shapes: B samples, C latent channels, T, H, W latent frames, height, width, N tokens, L text tokens, D width, K rows of
timesteps (1 where the whole sequence has one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lapwan.lora.layer import StackedLoraLinear
from lapwan.models.spec import TEXT_LENGTH
from lapwan.wan.text import pad_text
from lapwan.wan.transformer import kernels
from lapwan.wan.transformer.block import KeysValues, Rope, block_forward, layer_norm, text_keys_values, widened
from lapwan.wan.transformer.context_parallel import TokenShards
from lapwan.wan.transformer.first_block_cache import Side
from lapwan.wan.transformer.options import (
    Checkpointing,
    ForwardOptions,
    Prompt,
    TrainedInputs,
    forward_options,
    look_at,
    run_checkpointed,
)
from lapwan.wan.transformer.text_padding import fold, repeat_last

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


@dataclass(frozen=True)
class TokenTimes:
    """A sequence with few distinct timesteps: their values [B, K], and which one each token has [N]."""

    values_BK: Tensor
    row_of_token_N: Tensor


@dataclass(frozen=True)
class _Time:
    """Embedded timesteps: for the head [B, K, D], for the blocks [B, K, 6, D]; B and K may be 1 for all."""

    rows_BKD: Tensor
    modulation_BK6D: Tensor
    row_of_token_N: Tensor | None

    def of(self, own: slice) -> _Time:
        """For a part of the tokens."""
        if self.row_of_token_N is not None:
            return replace(self, row_of_token_N=self.row_of_token_N[own])
        if self.rows_BKD.shape[1] == 1:
            return self
        return replace(self, rows_BKD=self.rows_BKD[:, own], modulation_BK6D=self.modulation_BK6D[:, own])


def _embed_time(embedder: Any, timestep: Tensor | TokenTimes, dtype: torch.dtype) -> _Time:
    """Only distinct rows: an expanded dimension (stride 0) is one row, without asking the device."""
    row_of_token_N = None
    if isinstance(timestep, TokenTimes):
        values_BK, row_of_token_N = timestep.values_BK, timestep.row_of_token_N
    else:
        values_BK = timestep[:, None] if timestep.dim() == 1 else timestep
    first, second = embedder.time_embedder.linear_1, embedder.time_embedder.linear_2
    # An adapter on a time layer has gates by sample, so every sample keeps its row.
    adapted = any(isinstance(layer, StackedLoraLinear) for layer in (first, second, embedder.time_proj))
    for dim in (1,) if adapted else (0, 1):
        if values_BK.stride(dim) == 0:
            values_BK = values_BK.narrow(dim, 0, 1)
    shape = values_BK.shape
    sines = embedder.timesteps_proj(values_BK.flatten())
    plain: Any = first.base if isinstance(first, StackedLoraLinear) else first
    weight_dtype = plain.weight.dtype
    rows = embedder.time_embedder(sines.to(weight_dtype)).to(dtype)
    modulation = embedder.time_proj(embedder.act_fn(rows))
    return _Time(rows.unflatten(0, shape), modulation.unflatten(0, shape).unflatten(-1, (6, -1)), row_of_token_N)


def _patches(patch_embedding: nn.Conv3d, hidden_BCTHW: Tensor) -> Tensor:
    """A convolution whose stride is its kernel, as a product over patches: [B, N, D]."""
    t, h, w = patch_embedding.kernel_size
    batch, channels, frames, height, width = hidden_BCTHW.shape
    cut = hidden_BCTHW.reshape(batch, channels, frames // t, t, height // h, h, width // w, w)
    rows = cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, -1, channels * t * h * w)
    return F.linear(rows, patch_embedding.weight.flatten(1), patch_embedding.bias)


def _head(
    transformer: WanTransformer3DModel, x_BND: Tensor, time: _Time, latents_BCTHW: Tensor, split: TokenShards | None
) -> Tensor:
    """Norm, modulation, projection, and the patches put together again: those of all processes."""
    shift, scale = (transformer.scale_shift_table.unsqueeze(0) + time.rows_BKD.unsqueeze(2)).unbind(2)
    if time.row_of_token_N is not None:
        shift, scale = (part.index_select(1, time.row_of_token_N) for part in (shift, scale))
    y = layer_norm(transformer.norm_out, widened(x_BND)) * (1 + scale) + shift
    out = transformer.proj_out(y.to(x_BND.dtype))
    out = out if split is None else split.gather(out)
    t, h, w = transformer.config.patch_size
    batch, _, frames, height, width = latents_BCTHW.shape
    out = out.reshape(batch, frames // t, height // h, width // w, t, h, w, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    joined: Tensor = out.reshape(batch, -1, frames, height, width)
    return joined


@dataclass(frozen=True)
class _Words:
    """Embedded text: the last row stands `stands` times, `bias` is added to the rows' logits."""

    rows_BMD: Tensor
    bias: Tensor | None
    stands: int

    @cached_property
    def all_BLD(self) -> Tensor:
        """Every row."""
        return repeat_last(self.rows_BMD, self.stands)

    def keys_values(self, attention: Any) -> KeysValues:
        """A block's keys and values of every row, each computed once."""
        k, v = text_keys_values(attention, self.rows_BMD)
        return repeat_last(k, self.stands), repeat_last(v, self.stands)


def _words(transformer: WanTransformer3DModel, text: Tensor | Sequence[Tensor] | Prompt) -> _Words:
    embedder = transformer.condition_embedder.text_embedder
    if isinstance(text, Prompt):
        return _Words(text.embedded(transformer), text.bias, text.stands)
    if not isinstance(text, Tensor):
        longest = max(len(one) for one in text)
        if text[0].device.type != "cpu" and longest < TEXT_LENGTH:
            return _Words(embedder(pad_text(text, longest + 1)), None, TEXT_LENGTH - longest)
        text = pad_text(text)
    # Dropout draws for each row of the text, so there they all stay. (Only a CPU's text is ever folded.)
    asked = torch.is_grad_enabled() and text.device.type == "cpu"
    whole = asked and any(look_at(block).dropout for block in transformer.blocks)
    short, bias = (text, None) if whole else fold(text)
    return _Words(embedder(short), bias, 1)


@dataclass(frozen=True)
class _Stream:
    """What every block takes besides the tokens."""

    words: _Words
    prompt: Prompt | None
    time: _Time
    rope: Rope
    split: TokenShards | None


def _run_block(
    path: ForwardOptions, index: int, block: Any, x_BND: Tensor, given: _Stream, dropout: bool, kind: Checkpointing
) -> Tensor:
    # Dropout's masks are drawn in Python, by name: what compiles cannot hold them.
    function = block_forward if dropout else path.block
    if kind == "op" and path.selective is not None and not dropout:
        function, kind = path.selective, "off"
    words = given.words

    def run(x: Tensor, text_BLD: Tensor | None, modulation_BK6D: Tensor) -> Tensor:
        if path.residency is not None:
            path.residency.ready(index)
        keys_values = None if given.prompt is None else given.prompt.keys_values(index, block)
        if keys_values is None and text_BLD is None:
            keys_values = words.keys_values(block.attn2)
        out = function(
            block, x, text_BLD if keys_values is None else None, keys_values, modulation_BK6D,
            given.time.row_of_token_N, given.rope, words.bias, given.split,
        )
        if path.residency is not None:
            path.residency.done(index)
        return out

    # Without a graph each row's keys are computed once; with one the block does it, and may compute it again.
    text = None if words.stands > 1 and not torch.is_grad_enabled() else words.all_BLD
    return run_checkpointed(run, kind, x_BND, text, given.time.modulation_BK6D)


def predict(
    transformer: WanTransformer3DModel, hidden_BCTHW: Tensor, timestep: Tensor | TokenTimes,
    text: Tensor | Sequence[Tensor] | Prompt, reuse: Side | None = None,
) -> Tensor:
    """What `transformer(hidden, timestep, text)` gives: [B, out channels, T, H, W] in the weights' dtype.

    Args:
        timestep: [B], [B, N], or a sequence's few distinct ones.
        text: features [B, L, text width], those of each sample without padding, or a generation's prompt.
        reuse: may spare all blocks but the first (see `reuse`); without gradients.
    """
    path, embedder = forward_options(transformer), transformer.condition_embedder
    if path.modules and not isinstance(text, Prompt):
        features = (text if isinstance(text, Tensor) else pad_text(text)).to(hidden_BCTHW.dtype)
        whole: Tensor = transformer(hidden_BCTHW, timestep, features, return_dict=False)[0]
        return whole
    kernels.prepare(hidden_BCTHW.device)
    grad = torch.is_grad_enabled()
    dtype = hidden_BCTHW.dtype
    with torch.no_grad():  # a table of the size alone
        rope = path.rope(transformer, hidden_BCTHW)
    words = _words(transformer, text)
    time = _embed_time(embedder, timestep, dtype)
    x = _patches(transformer.patch_embedding, hidden_BCTHW)
    split = None if path.spread is None else path.spread.split(x.shape[1])
    if split is not None:
        x, time, rope = x[:, split.own], time.of(split.own), (rope[0][split.own], rope[1][split.own])
    checkpointing = path.checkpointing or ("block" if transformer.gradient_checkpointing else "off")
    given = _Stream(words, text if isinstance(text, Prompt) else None, time, rope, split)
    graphs, started = 0, grad and any(t.requires_grad for t in (x, words.rows_BMD, time.modulation_BK6D))
    x_in = x_first = None if reuse is None else x  # no longer than they are asked for
    for index, block in enumerate(transformer.blocks):
        if reuse is not None and index == 1:
            assert x_in is not None
            x_first = x
            if (kept := reuse.end(x_in, x, split)) is not None:
                return _head(transformer, kept, time, hidden_BCTHW, split)
        seen = look_at(block) if grad else TrainedInputs(False, False)  # here, where a device has work meanwhile
        started = started or seen.graph
        kind: Checkpointing = "off" if not started else "block" if graphs < path.whole_blocks else checkpointing
        with torch.set_grad_enabled(started):
            x = _run_block(path, index, block, x, given, seen.dropout, kind)
        graphs += started
    if reuse is not None:
        assert x_first is not None
        reuse.computed(x_first, x, lambda end: _head(transformer, end, time, hidden_BCTHW, split), split)
    return _head(transformer, x, time, hidden_BCTHW, split)
