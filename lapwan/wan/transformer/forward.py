"""The forward of Wan's transformer over diffusers' modules, with the same result as theirs for less work.

Blocks before the first trained one run without a graph. This is exact: nothing before them can receive a gradient.
Shapes: B samples, C latent channels, T, H, W latent frames, height, width, N tokens, L text tokens, D width, K rows of
timesteps (1 where the whole sequence has one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lapwan.lora.layer import StackedLoraLinear
from lapwan.names import Checkpointing
from lapwan.wan.transformer import kernels
from lapwan.wan.transformer.block import BlockFunction, Rope, block_forward, by_run, layer_norm
from lapwan.wan.transformer.checkpointing import run_checkpointed
from lapwan.wan.transformer.context_parallel import ContextParallel, TokenShards
from lapwan.wan.transformer.first_block_cache import CacheBranch
from lapwan.wan.transformer.prompt import PromptCache, TextRows, padded_rows

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

_MAX_ROPE_TABLES = 4  # one per bucket, the oldest is dropped


class Residency(Protocol):
    """Brings the weights of blocks to the device."""

    def ready(self, index: int) -> None:
        """Called before block `index` computes: makes its weights available to the current stream."""

    def done(self, index: int) -> None:
        """Called when block `index` has been launched."""


@dataclass(eq=False)
class ForwardOptions:
    """How a backbone's forward runs. None of it changes a result, except for the rounding of the compiler's kernels.

    Args:
        block: the function that computes a block; `block_forward` or its compiled form.
        selective: a compiled block that applies "op" checkpointing inside; None: not compiled.
        residency: brings a block's weights to the device; None: they are there.
        checkpointing: what the backward recomputes.
        whole_blocks: how many of the first blocks with a graph are recomputed whole, whatever `checkpointing` is.
        diffusers_forward: run diffusers' own forward, because FSDP gathers weights where a module is called.
        context_parallel: the processes that share a sequence's tokens.
    """

    block: BlockFunction = block_forward
    selective: BlockFunction | None = None
    residency: Residency | None = None
    checkpointing: Checkpointing = "off"
    whole_blocks: int = 0
    diffusers_forward: bool = False
    context_parallel: ContextParallel | None = None
    rope_tables: dict[tuple[Any, ...], Rope] = field(default_factory=dict)

    def rope(self, transformer: WanTransformer3DModel, latents_BCTHW: Tensor) -> Rope:
        """cos and ±sin [N, 1, d] in fp32 for latents of this size; computed once per size."""
        key = (*latents_BCTHW.shape[2:], latents_BCTHW.device)
        if key not in self.rope_tables:
            while len(self.rope_tables) >= _MAX_ROPE_TABLES:
                self.rope_tables.pop(next(iter(self.rope_tables)))
            cos, sin = (table[0].contiguous() for table in transformer.rope(latents_BCTHW))
            sign = sin.new_tensor([-1.0, 1.0]).repeat(sin.shape[-1] // 2)
            self.rope_tables[key] = (cos, sin * sign)
        return self.rope_tables[key]


@dataclass(frozen=True)
class TokenTimes:
    """A sequence with few distinct timesteps: their values [B, K], and how many consecutive tokens have each (K)."""

    values_BK: Tensor
    counts: tuple[int, ...]

    def per_token(self) -> Tensor:
        """[B, N], as diffusers' own forward takes it."""
        return torch.cat([value_B1.expand(-1, n) for value_B1, n in zip(
            torch.split(self.values_BK, 1, dim=1), self.counts, strict=True)], dim=1)


def first_frame_times(timestep_B: Tensor, clean_B: Tensor, size_THW: Sequence[int], patch: Sequence[int]) -> TokenTimes:
    """Timesteps of sequences whose first latent frame may be given: 0 for its tokens where it is, t for all others.

    Args:
        timestep_B: one per sample.
        clean_B: bool, whether the sample's first frame is given.
        size_THW: of the latents.
        patch: (frames, height, width) of a token, in latent pixels.
    """
    frames, height, width = (size // step for size, step in zip(size_THW, patch, strict=True))
    counts, first_B = (height * width, (frames - 1) * height * width), timestep_B * ~clean_B
    if frames == 1:
        return TokenTimes(first_B[:, None], counts[:1])
    return TokenTimes(torch.stack([first_B, timestep_B], dim=1), counts)


@dataclass(frozen=True)
class _Time:
    """Embedded timesteps: for the head [B, K, D], for the blocks [B, K, 6, D]; B and K are 1 where all are equal.

    `counts`: how many consecutive tokens have each of the K rows; None: K is 1 or N.
    """

    rows_BKD: Tensor
    modulation_BK6D: Tensor
    counts: tuple[int, ...] | None

    def of(self, tokens: slice) -> _Time:
        """The same for a part of the tokens."""
        if self.counts is not None:
            ends = list(accumulate(self.counts))
            local = [min(end, tokens.stop) - max(end - n, tokens.start)
                     for end, n in zip(ends, self.counts, strict=True)]
            present = [k for k, n in enumerate(local) if n > 0] or [0]
            rows = slice(present[0], present[-1] + 1)
            counts = tuple(local[rows])
            return _Time(self.rows_BKD[:, rows], self.modulation_BK6D[:, rows], counts if len(counts) > 1 else None)
        if self.rows_BKD.shape[1] == 1:
            return self
        return replace(self, rows_BKD=self.rows_BKD[:, tokens], modulation_BK6D=self.modulation_BK6D[:, tokens])


def _embed_time(embedder: Any, timestep: Tensor | TokenTimes, dtype: torch.dtype) -> _Time:
    """Embeds distinct rows only: an expanded dimension (stride 0) is one row, known without a device sync."""
    counts = None
    if isinstance(timestep, TokenTimes):
        values_BK, counts = timestep.values_BK, timestep.counts if len(timestep.counts) > 1 else None
    else:
        values_BK = timestep[:, None] if timestep.dim() == 1 else timestep
    first, second = embedder.time_embedder.linear_1, embedder.time_embedder.linear_2
    # An adapter on a time layer has per-sample gates, so every sample keeps its row.
    adapted = any(isinstance(layer, StackedLoraLinear) for layer in (first, second, embedder.time_proj))
    for dim in (1,) if adapted else (0, 1):
        if values_BK.stride(dim) == 0 and (dim == 0 or counts is None):
            values_BK = values_BK.narrow(dim, 0, 1)
    shape = values_BK.shape
    sines = embedder.timesteps_proj(values_BK.flatten())
    plain: Any = first.base if isinstance(first, StackedLoraLinear) else first
    weight_dtype = plain.weight.dtype
    rows = embedder.time_embedder(sines.to(weight_dtype)).to(dtype)
    modulation = embedder.time_proj(embedder.act_fn(rows))
    return _Time(rows.unflatten(0, shape), modulation.unflatten(0, shape).unflatten(-1, (6, -1)), counts)


def _patches(patch_embedding: nn.Conv3d, hidden_BCTHW: Tensor) -> Tensor:
    """The patch embedding as a matrix product, since the convolution's stride is its kernel: [B, N, D]."""
    t, h, w = patch_embedding.kernel_size
    batch, channels, frames, height, width = hidden_BCTHW.shape
    patches = hidden_BCTHW.reshape(batch, channels, frames // t, t, height // h, h, width // w, w)
    rows = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, -1, channels * t * h * w)
    return F.linear(rows, patch_embedding.weight.flatten(1), patch_embedding.bias)


def _head(
    transformer: WanTransformer3DModel, x_BND: Tensor, time: _Time, latents_BCTHW: Tensor, shards: TokenShards | None
) -> Tensor:
    """Norm, modulation, projection, and unpatchify; with `shards` the result has the tokens of all processes."""
    shift, scale = (transformer.scale_shift_table.unsqueeze(0) + time.rows_BKD.unsqueeze(2)).unbind(2)
    wide = torch.promote_types(x_BND.dtype, torch.float32)

    def modulate(x: Tensor, scale_BKD: Tensor, shift_BKD: Tensor) -> Tensor:
        y: Tensor = layer_norm(transformer.norm_out, x.to(wide)) * (1 + scale_BKD) + shift_BKD
        return y.to(x.dtype)

    out = transformer.proj_out(by_run(modulate, time.counts, [x_BND], [scale, shift]))
    out = out if shards is None else shards.gather(out)
    t, h, w = transformer.config.patch_size
    batch, _, frames, height, width = latents_BCTHW.shape
    out = out.reshape(batch, frames // t, height // h, width // w, t, h, w, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    joined: Tensor = out.reshape(batch, -1, frames, height, width)
    return joined


@dataclass(frozen=True)
class BlockNeeds:
    """Whether a block needs an autograd graph of its own, and whether LoRA dropout acts in it."""

    graph: bool
    dropout: bool


def block_needs(block: nn.Module) -> BlockNeeds:
    """A block needs a graph if it has a parameter that requires grad, or gates that do."""
    graph, dropout = any(p.requires_grad for p in block.parameters()), False
    for module in block.modules():
        if isinstance(module, StackedLoraLinear):
            gates = module.holder.gates_BG
            graph = graph or (gates is not None and gates.requires_grad)
            dropout = dropout or module.holder.mask is not None
    return BlockNeeds(graph, dropout)


def _embed_text(
    transformer: WanTransformer3DModel, text: Tensor | Sequence[Tensor] | TextRows | PromptCache
) -> TextRows:
    if isinstance(text, PromptCache):
        return text.text
    if not isinstance(text, TextRows):
        device = text.device if isinstance(text, Tensor) else text[0].device
        may_drop = torch.is_grad_enabled() and device.type == "cpu"
        text = padded_rows(text, may_drop and any(block_needs(block).dropout for block in transformer.blocks))
    return text.embedded(transformer)


@dataclass(frozen=True)
class _BlockInputs:
    """What every block takes besides the tokens."""

    text: TextRows
    prompt: PromptCache | None
    time: _Time
    rope: Rope
    shards: TokenShards | None


def _run_block(
    options: ForwardOptions, index: int, block: Any, x_BND: Tensor, inputs: _BlockInputs, dropout: bool,
    kind: Checkpointing,
) -> Tensor:
    # Dropout's masks are drawn in Python, keyed by module name: a compiled graph cannot hold them.
    function = block_forward if dropout else options.block
    if kind == "op" and options.selective is not None and not dropout:
        function, kind = options.selective, "off"
    text = inputs.text

    def run(x: Tensor, text_BLD: Tensor | None, modulation_BK6D: Tensor) -> Tensor:
        if options.residency is not None:
            options.residency.ready(index)
        keys_values = None if inputs.prompt is None else inputs.prompt.keys_values(index, block)
        if keys_values is None and text_BLD is None:
            keys_values = text.keys_values(block.attn2)
        out = function(
            block, x, text_BLD if keys_values is None else None, keys_values, modulation_BK6D,
            inputs.time.counts, inputs.rope, text.bias, inputs.shards,
        )
        if options.residency is not None:
            options.residency.done(index)
        return out

    # Without a graph, each row's keys are computed once. With one, the block computes them and may recompute them.
    text_BLD = None if text.last_row_count > 1 and not torch.is_grad_enabled() else text.all_BLD
    arguments = x_BND, text_BLD, inputs.time.modulation_BK6D
    return run(*arguments) if kind == "off" else run_checkpointed(run, kind, *arguments)


def predict(
    transformer: WanTransformer3DModel, options: ForwardOptions, hidden_BCTHW: Tensor, timestep: Tensor | TokenTimes,
    text: Tensor | Sequence[Tensor] | TextRows | PromptCache, first_block_cache: CacheBranch | None = None,
) -> Tensor:
    """What `transformer(hidden, timestep, text)` returns: [B, out channels, T, H, W] in the weights' dtype.

    Args:
        timestep: [B], one per token [B, N], or the few distinct ones of a sequence.
        text: features [B, L, text width], a list of each sample's without padding, rows without most of their padding,
            or a prompt's cache in this transformer.
        first_block_cache: may skip all blocks but the first; without gradients.
    """
    kernels.TRITON.try_on(hidden_BCTHW.device)
    grad = torch.is_grad_enabled()
    dtype, checkpointing = hidden_BCTHW.dtype, options.checkpointing
    with torch.no_grad():  # depends on the size alone
        rope = options.rope(transformer, hidden_BCTHW)
    embedded = _embed_text(transformer, text)
    time = _embed_time(transformer.condition_embedder, timestep, dtype)
    x = _patches(transformer.patch_embedding, hidden_BCTHW)
    shards = None if options.context_parallel is None else options.context_parallel.split(x.shape[1])
    if shards is not None:
        local = shards.local
        x, time, rope = x[:, local], time.of(local), (rope[0][local], rope[1][local])
    inputs = _BlockInputs(embedded, text if isinstance(text, PromptCache) else None, time, rope, shards)
    graphs, started = 0, grad and any(t.requires_grad for t in (x, embedded.rows_BMD, time.modulation_BK6D))
    x_in = x_first = None if first_block_cache is None else x  # held no longer than needed
    for index, block in enumerate(transformer.blocks):
        if first_block_cache is not None and index == 1:
            assert x_in is not None
            x_first = x
            if (x_end := first_block_cache.end(x_in, x, shards)) is not None:
                return _head(transformer, x_end, time, hidden_BCTHW, shards)
        needs = block_needs(block) if grad else BlockNeeds(False, False)  # in the loop, while the device is busy
        started = started or needs.graph
        kind: Checkpointing = "off" if not started else "block" if graphs < options.whole_blocks else checkpointing
        with torch.set_grad_enabled(started):
            x = _run_block(options, index, block, x, inputs, needs.dropout, kind)
        graphs += started
    if first_block_cache is not None:
        assert x_first is not None
        first_block_cache.computed(x_first, x, lambda end: _head(transformer, end, time, hidden_BCTHW, shards), shards)
    return _head(transformer, x, time, hidden_BCTHW, shards)
