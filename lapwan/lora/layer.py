"""One stacked low-rank layer over a Linear: plain LoRA, a frozen base LoRA and a mixture of experts are its groups.

Shapes: B samples, N tokens, I in features, O out features, R rows (the ranks of all groups together), G groups.
How to add a kind of adapter: a group, and a column of gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GateHolder:
    """Carries gates_BG to every layer of a transformer, over the forward *and* the backward pass.

    A plain object, not a context variable: activation recomputation runs on autograd's own threads on a GPU, and must
    meet the gates of its forward. With `required`, a forward without gates is an error instead of gates of one.
    """

    def __init__(self, required: bool = False) -> None:
        self.required = required
        self.gates_BG: Tensor | None = None
        # Dropout between down and up: (layer, [B, ..., R]) -> [B, ..., R]. Held over forward and backward like gates.
        self.mask: Callable[[StackedLoraLinear, Tensor], Tensor] | None = None

    @contextmanager
    def scope(self, gates_BG: Tensor) -> Iterator[None]:
        """Hold the gates (one row per sample, or a single row for all) until the block ends: backward goes inside."""
        before, self.gates_BG = self.gates_BG, gates_BG
        try:
            yield
        finally:
            self.gates_BG = before


@dataclass(frozen=True)
class LayerGroup:
    """One group's part in one layer: ΔW = alpha / r · up @ down. `column` is its column in the gates."""

    column: int
    down_RI: Tensor
    up_OR: Tensor
    alpha: float
    trainable: bool


class StackedLoraLinear(nn.Module):
    """y = W x + b + up · ((gate · alpha/r) ∘ (down · x)), gates multiplied in rank space, per sample.

    x is [B, ..., I]. Trainable groups are stacked into the parameters `down_RI` and `up_OR`, frozen ones into buffers.
    """

    group_of_row_R: Tensor
    scale_R: Tensor
    frozen_down_RI: Tensor
    frozen_up_OR: Tensor

    def __init__(self, base: nn.Linear, groups: Sequence[LayerGroup], holder: GateHolder) -> None:
        super().__init__()
        self.base = base
        self.holder = holder
        device = base.weight.device
        # Frozen rows first, so that one concatenation joins them with the trained ones.
        self.groups = sorted(groups, key=lambda group: group.trainable)
        frozen = [g for g in self.groups if not g.trainable]
        trained = [g for g in self.groups if g.trainable]

        def stack(parts: list[Tensor], dim: int, empty: tuple[int, int]) -> Tensor:
            joined = torch.cat(parts, dim) if parts else torch.empty(empty)
            # Not below fp32: a training step of 1e-4 would vanish in bf16's rounding.
            return joined.to(device=device, dtype=torch.promote_types(joined.dtype, torch.float32), copy=True)

        rows, columns = (0, base.in_features), (base.out_features, 0)
        self.register_buffer("frozen_down_RI", stack([g.down_RI for g in frozen], 0, rows), persistent=False)
        self.register_buffer("frozen_up_OR", stack([g.up_OR for g in frozen], 1, columns), persistent=False)
        self.down_RI = nn.Parameter(stack([g.down_RI for g in trained], 0, rows), requires_grad=bool(trained))
        self.up_OR = nn.Parameter(stack([g.up_OR for g in trained], 1, columns), requires_grad=bool(trained))
        ranks = torch.tensor([g.down_RI.shape[0] for g in self.groups])
        group_of_row = torch.tensor([g.column for g in self.groups]).repeat_interleave(ranks)
        scale = torch.tensor([g.alpha / g.down_RI.shape[0] for g in self.groups], dtype=torch.float64)
        self.register_buffer("group_of_row_R", group_of_row.to(device), persistent=False)
        self.register_buffer("scale_R", scale.repeat_interleave(ranks).to(device), persistent=False)

    def _row_scale(self, x: Tensor) -> Tensor:
        """alpha/r of each row, times its sample's gate: [R], or [B, 1.., R]."""
        gates = self.holder.gates_BG
        if gates is None:
            if self.holder.required:
                raise RuntimeError("a mixture's forward ran without gates: run it inside GateHolder.scope(gates)")
            return self.scale_R.to(x.dtype)
        if gates.shape[0] not in (1, x.shape[0]):
            raise RuntimeError(f"gates for {gates.shape[0]} samples met a batch of {x.shape[0]}")
        scaled = gates[:, self.group_of_row_R] * self.scale_R.to(gates.dtype)
        return scaled.to(x.dtype).view(gates.shape[0], *[1] * (x.dim() - 2), -1)

    def forward(self, x: Tensor) -> Tensor:
        down = torch.cat([self.frozen_down_RI, self.down_RI]) if len(self.frozen_down_RI) else self.down_RI
        up = torch.cat([self.frozen_up_OR, self.up_OR], 1) if self.frozen_up_OR.shape[1] else self.up_OR
        hidden = F.linear(x, down.to(x.dtype)) * self._row_scale(x)
        if self.holder.mask is not None:
            hidden = self.holder.mask(self, hidden)
        y: Tensor = self.base(x)
        return y + F.linear(hidden, up.to(x.dtype))

    def rows(self, column: int) -> tuple[Tensor, Tensor]:
        """(down, up) of one group, views into the stacked tensors."""
        start = {True: 0, False: 0}
        for group in self.groups:
            rank = group.down_RI.shape[0]
            first = start[group.trainable]
            if group.column == column:
                if group.trainable:
                    return self.down_RI[first : first + rank], self.up_OR[:, first : first + rank]
                return self.frozen_down_RI[first : first + rank], self.frozen_up_OR[:, first : first + rank]
            start[group.trainable] += rank
        raise KeyError(column)
