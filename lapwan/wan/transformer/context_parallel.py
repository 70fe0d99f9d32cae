"""A sequence over several processes: each holds a part of the tokens, and for attention tokens are exchanged for heads.

    [B, N/P, H, d]  <->  [B, N, H/P, d]

Where the sequence is split and gathered is diffusers' plan for its transformer (`WanTransformer3DModel._cp_plan`): the
first block's input and the rope tables along the tokens, the last projection's output; the text is whole everywhere.
The result is that of one process up to rounding, since every sum is taken whole by one of them.
Source: DeepSpeed Ulysses (arXiv 2309.14509).

Shapes: B samples, N tokens of all P processes, n of this one, H heads, h = H/P, d head width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapwan.errors import UserError


def _exchanged(sent: Tensor, sizes: Sequence[int], own: Sequence[int]) -> Tensor:
    """What the others sent here, one after the other; `own` and `sizes` count what goes to and comes from each."""
    import torch.distributed as dist

    # As bytes: the backends do not all know every dtype.
    width, out = sent.itemsize, sent.new_empty(sum(sizes))
    dist.all_to_all_single(
        out.view(torch.uint8), sent.view(torch.uint8), [width * size for size in sizes], [width * size for size in own])
    return out


@torch.library.custom_op("lapwan::to_heads", mutates_args=())
def _to_heads(x_BnHd: Tensor, tokens: Sequence[int], rank: int) -> Tensor:
    batch, own, heads, width = x_BnHd.shape
    count = len(tokens)
    few = heads // count
    sent = torch.unflatten(x_BnHd, 2, (count, few)).permute(2, 0, 1, 3, 4).contiguous().flatten()
    sizes = [batch * n * few * width for n in tokens]
    came = _exchanged(sent, sizes, [batch * own * few * width] * count)
    parts = [part.view(batch, n, few, width) for part, n in zip(torch.split(came, sizes), tokens, strict=True)]
    return torch.cat(parts, 1)


@_to_heads.register_fake
def _(x_BnHd: Tensor, tokens: Sequence[int], rank: int) -> Tensor:
    batch, _, heads, width = x_BnHd.shape
    return x_BnHd.new_empty(batch, sum(tokens), heads // len(tokens), width)


@torch.library.custom_op("lapwan::to_tokens", mutates_args=())
def _to_tokens(x_BNhd: Tensor, tokens: Sequence[int], rank: int) -> Tensor:
    batch, _, few, width = x_BNhd.shape
    count, own = len(tokens), tokens[rank]
    sent = torch.cat([part.reshape(-1) for part in torch.split(x_BNhd, list(tokens), 1)])
    each = batch * own * few * width
    came = _exchanged(sent, [each] * count, [batch * n * few * width for n in tokens])
    return came.view(count, batch, own, few, width).permute(1, 2, 0, 3, 4).reshape(batch, own, count * few, width)


@_to_tokens.register_fake
def _(x_BNhd: Tensor, tokens: Sequence[int], rank: int) -> Tensor:
    batch, _, few, width = x_BNhd.shape
    return x_BNhd.new_empty(batch, tokens[rank], few * len(tokens), width)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.tokens, ctx.rank = inputs


# An exchange only moves numbers, so the gradient moves back.
_to_heads.register_autograd(lambda ctx, grad: (_to_tokens(grad, ctx.tokens, ctx.rank), None, None),
                            setup_context=_remember)
_to_tokens.register_autograd(lambda ctx, grad: (_to_heads(grad, ctx.tokens, ctx.rank), None, None),
                             setup_context=_remember)


@dataclass(frozen=True)
class TokenShards:
    """A sequence in parts: how many tokens each process has, and which process this is."""

    tokens: tuple[int, ...]
    rank: int

    @property
    def own(self) -> slice:
        """This process's tokens."""
        start = sum(self.tokens[: self.rank])
        return slice(start, start + self.tokens[self.rank])

    def to_heads(self, x_BnHd: Tensor) -> Tensor:
        """All tokens of this process's share of the heads."""
        out: Tensor = _to_heads(x_BnHd, self.tokens, self.rank)
        return out

    def to_tokens(self, x_BNhd: Tensor) -> Tensor:
        """All heads of this process's tokens."""
        out: Tensor = _to_tokens(x_BNhd, self.tokens, self.rank)
        return out

    def gather(self, x_BnC: Tensor) -> Tensor:
        """All tokens, in every process."""
        copies = x_BnC.unsqueeze(2).expand(-1, -1, len(self.tokens), -1)
        return self.to_heads(copies).squeeze(2)

    def sum(self, x: Tensor) -> Tensor:
        """Over the processes; the same bytes in each."""
        import torch.distributed as dist

        x = x.clone()
        dist.all_reduce(x)
        return x


@dataclass(frozen=True)
class ContextParallel:
    """The processes that share a sequence.

    A gradient that one of them finds is the part its own tokens contribute, of the sum of all processes' losses.
    """

    rank: int
    count: int

    def split(self, tokens: int) -> TokenShards:
        """Parts that differ by one token at most."""
        each, more = divmod(tokens, self.count)
        return TokenShards(tuple(each + (rank < more) for rank in range(self.count)), self.rank)


def check_heads(heads: int, count: int) -> None:
    """Refuse a number of processes that the heads do not divide among."""
    if heads % count:
        allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(f"{count} processes cannot share this model's {heads} heads of attention; start one of "
                        f"{allowed}")
