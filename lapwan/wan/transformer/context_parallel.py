"""Context parallelism: the tokens of a sequence are sharded over processes, and exchanged for heads in attention.

    [B, N/P, H, d]  <->  [B, N, H/P, d]

The sequence is split and gathered where diffusers' plan for its transformer does so (`WanTransformer3DModel._cp_plan`):
the first block's input and the rope tables along the tokens, the last projection's output; the text is replicated.
The result is that of one process up to rounding, since no sum is split between processes.
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


def _all_to_all(sent: Tensor, receive_sizes: Sequence[int], send_sizes: Sequence[int]) -> Tensor:
    """What each process sent here, in order of rank, flat; sizes are elements per process."""
    import torch.distributed as dist

    # As bytes: not every backend supports every dtype.
    width, out = sent.itemsize, sent.new_empty(sum(receive_sizes))
    dist.all_to_all_single(
        out.view(torch.uint8), sent.view(torch.uint8), [width * size for size in receive_sizes],
        [width * size for size in send_sizes])
    return out


@torch.library.custom_op("lapwan::to_heads", mutates_args=())
def _to_heads(x_BnHd: Tensor, tokens: Sequence[int], rank: int) -> Tensor:
    batch, local, heads, width = x_BnHd.shape
    count = len(tokens)
    local_heads = heads // count
    sent = torch.unflatten(x_BnHd, 2, (count, local_heads)).permute(2, 0, 1, 3, 4).contiguous().flatten()
    sizes = [batch * n * local_heads * width for n in tokens]
    received = _all_to_all(sent, sizes, [batch * local * local_heads * width] * count)
    parts = [part.view(batch, n, local_heads, width)
             for part, n in zip(torch.split(received, sizes), tokens, strict=True)]
    return torch.cat(parts, 1)


@_to_heads.register_fake
def _(x_BnHd: Tensor, tokens: Sequence[int], rank: int) -> Tensor:
    batch, _, heads, width = x_BnHd.shape
    return x_BnHd.new_empty(batch, sum(tokens), heads // len(tokens), width)


@torch.library.custom_op("lapwan::to_tokens", mutates_args=())
def _to_tokens(x_BNhd: Tensor, tokens: Sequence[int], rank: int) -> Tensor:
    batch, _, local_heads, width = x_BNhd.shape
    count, local = len(tokens), tokens[rank]
    sent = torch.cat([part.reshape(-1) for part in torch.split(x_BNhd, list(tokens), 1)])
    size = batch * local * local_heads * width
    received = _all_to_all(sent, [size] * count, [batch * n * local_heads * width for n in tokens])
    heads = received.view(count, batch, local, local_heads, width).permute(1, 2, 0, 3, 4)
    return heads.reshape(batch, local, count * local_heads, width)


@_to_tokens.register_fake
def _(x_BNhd: Tensor, tokens: Sequence[int], rank: int) -> Tensor:
    batch, _, local_heads, width = x_BNhd.shape
    return x_BNhd.new_empty(batch, tokens[rank], local_heads * len(tokens), width)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.tokens, ctx.rank = inputs


# An exchange only moves numbers: its backward is the inverse exchange.
_to_heads.register_autograd(lambda ctx, grad: (_to_tokens(grad, ctx.tokens, ctx.rank), None, None),
                            setup_context=_setup_context)
_to_tokens.register_autograd(lambda ctx, grad: (_to_heads(grad, ctx.tokens, ctx.rank), None, None),
                             setup_context=_setup_context)


@dataclass(frozen=True)
class TokenShards:
    """A sharded sequence: how many tokens each process has, and the rank of this one."""

    tokens: tuple[int, ...]
    rank: int

    @property
    def local(self) -> slice:
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
        """The sum over the processes; the same bytes in each."""
        import torch.distributed as dist

        x = x.clone()
        dist.all_reduce(x)
        return x


@dataclass(frozen=True)
class ContextParallel:
    """The processes that share a sequence.

    A process's gradient is the contribution of its local tokens to the gradient of the sum of all processes' losses.
    """

    rank: int
    count: int

    def split(self, tokens: int) -> TokenShards:
        """Shards whose sizes differ by one token at most."""
        each, more = divmod(tokens, self.count)
        return TokenShards(tuple(each + (rank < more) for rank in range(self.count)), self.rank)


def check_heads(heads: int, count: int) -> None:
    """Check that `count` processes can share the attention heads.

    Raises:
        UserError: `heads` is not divisible by `count`.
    """
    if heads % count:
        allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(f"{count} processes cannot share this model's {heads} attention heads; start one of "
                        f"{allowed}")
