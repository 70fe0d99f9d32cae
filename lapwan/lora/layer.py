"""The stacked LoRA layer, and the linear layers it can be put over: nn.Linear, or a frozen (quantised) one.

Shapes: B samples, I input features, O output features, R stacked rows (the sum of the groups' ranks), G groups.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FrozenLinear(nn.Module):
    """y = W̃ x + b with a W̃ that is never trained. x is [..., I] in a floating dtype, y [..., O] in the same.

    The gradient with respect to x is g W̃; there is none of W̃ or b.
    How to add a form of weight: a subclass with `weight_as` and `forward`, whose tensors are buffers.

    Args:
        in_features: I.
        out_features: O.
    """

    weight: None = None  # transformers' T5 casts its input to the dtype of `weight` unless it is None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return next(self.buffers()).device

    @abstractmethod
    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """W̃ in `dtype`, [O, I]: dequantised anew at every call."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""

    @classmethod
    def forward_many(cls, layers: Sequence[FrozenLinear], x: Tensor) -> list[Tensor]:
        """`[layer(x) for layer in layers]`; a subclass may share between them what it computes from x alone.

        Args:
            layers: of this class, with the same I.
            x: [..., I].

        Returns:
            [..., O] for each layer.
        """
        return [layer(x) for layer in layers]


def device_of(base: nn.Linear | FrozenLinear) -> torch.device:
    """The device of a linear's weight."""
    return base.weight.device if isinstance(base, nn.Linear) else base.device


class GateHolder:
    """Holds gates_BG for every layer of a transformer, during the forward *and* the backward pass.

    A plain object, not a context variable: on a GPU activation recomputation runs on autograd's threads, and must see
    the gates of its forward. With `required`, a forward without gates raises; else the gates are 1.
    """

    def __init__(self, required: bool = False) -> None:
        self.required = required
        self.gates_BG: Tensor | None = None
        # Dropout between down and up: (layer, [B, ..., R]) -> [B, ..., R]. Held over forward and backward as the gates.
        self.mask: Callable[[StackedLoraLinear, Tensor], Tensor] | None = None

    @contextmanager
    def scope(self, gates_BG: Tensor) -> Iterator[None]:
        """Hold the gates until the block ends; run backward inside.

        Args:
            gates_BG: one row for all samples, or one per sample. They are repeated for a batch of several copies of
                the samples (classifier-free guidance).
        """
        before, self.gates_BG = self.gates_BG, gates_BG
        try:
            yield
        finally:
            self.gates_BG = before


@dataclass(frozen=True)
class LayerGroup:
    """One group in one layer: ΔW = alpha / r · up @ down. `column` is its column in the gates."""

    column: int
    down_RI: Tensor
    up_OR: Tensor
    alpha: float
    trainable: bool


class StackedLoraLinear(nn.Module):
    """y = W x + b + up · ((gate · alpha/r) ∘ (down · x)), gates multiplied in rank space, per sample.

    x is [B, ..., I]. Trainable groups are stacked into the parameters `down_RI` and `up_OR`, frozen ones into buffers.

    Args:
        base: the frozen linear W, b.
        groups: the LoRAs of this layer.
        holder: the gates, shared by all layers of a transformer.
    """

    group_of_row_R: Tensor
    scale_R: Tensor
    frozen_down_RI: Tensor
    frozen_up_OR: Tensor

    def __init__(self, base: nn.Linear | FrozenLinear, groups: Sequence[LayerGroup], holder: GateHolder) -> None:
        super().__init__()
        self.base = base
        self.holder = holder
        device = device_of(base)
        # Frozen rows first, so that one concatenation joins them with the trainable ones.
        self.groups = sorted(groups, key=lambda group: group.trainable)
        frozen = [g for g in self.groups if not g.trainable]
        trainable = [g for g in self.groups if g.trainable]

        def stack(parts: list[Tensor], dim: int, empty: tuple[int, int]) -> Tensor:
            joined = torch.cat(parts, dim) if parts else torch.empty(empty)
            # At least fp32: a training step of 1e-4 would be lost in bf16's rounding.
            return joined.to(device=device, dtype=torch.promote_types(joined.dtype, torch.float32), copy=True)

        rows, columns = (0, base.in_features), (base.out_features, 0)
        self.register_buffer("frozen_down_RI", stack([g.down_RI for g in frozen], 0, rows), persistent=False)
        self.register_buffer("frozen_up_OR", stack([g.up_OR for g in frozen], 1, columns), persistent=False)
        self.down_RI = nn.Parameter(stack([g.down_RI for g in trainable], 0, rows), requires_grad=bool(trainable))
        self.up_OR = nn.Parameter(stack([g.up_OR for g in trainable], 1, columns), requires_grad=bool(trainable))
        ranks = torch.tensor([g.down_RI.shape[0] for g in self.groups])
        group_of_row = torch.tensor([g.column for g in self.groups]).repeat_interleave(ranks)
        scale = torch.tensor([g.alpha / g.down_RI.shape[0] for g in self.groups], dtype=torch.float64)
        self.register_buffer("group_of_row_R", group_of_row.to(device), persistent=False)
        self.register_buffer("scale_R", scale.repeat_interleave(ranks).to(device), persistent=False)

    def row_scale(self, x: Tensor) -> Tensor:
        """alpha/r of each row, times the sample's gate: [R], or [B, 1.., R].

        Raises:
            RuntimeError: no gates where they are required, or gates of another batch.
        """
        gates = self.holder.gates_BG
        if gates is None:
            if self.holder.required:
                raise RuntimeError("a mixture's forward ran without gates: run it inside GateHolder.scope(gates)")
            return self.scale_R.to(x.dtype)
        if x.shape[0] % gates.shape[0]:
            raise RuntimeError(f"gates for {gates.shape[0]} samples, but a batch of {x.shape[0]}")
        # A masked sum instead of indexing: the backward of indexing adds in no fixed order.
        columns = torch.arange(gates.shape[1], device=gates.device)
        scale_GR = (self.group_of_row_R == columns[:, None]) * self.scale_R.to(gates.dtype)
        scaled = (gates[:, :, None] * scale_GR).sum(dim=1)
        if gates.shape[0] not in (1, x.shape[0]):
            scaled = scaled.repeat(x.shape[0] // gates.shape[0], 1)
        return scaled.to(x.dtype).view(scaled.shape[0], *[1] * (x.dim() - 2), -1)

    def forward(self, x: Tensor) -> Tensor:
        return project([self], x)[0]

    def up(self) -> Tensor:
        """[O, R], frozen rows first."""
        return torch.cat([self.frozen_up_OR, self.up_OR], 1) if self.frozen_up_OR.shape[1] else self.up_OR

    def rows(self, column: int) -> tuple[Tensor, Tensor]:
        """(down, up) of one group, views into the stacked tensors.

        Raises:
            KeyError: this layer has no such group.
        """
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


def project(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """`[layer(x) for layer in layers]`, with one down-projection for all stacked layers among them (q, k and v).

    The rows of the layers' A are concatenated, and each B takes its rows of A·x.

    Args:
        layers: linears with the same I, stacked or not.
        x: [B, ..., I].

    Returns:
        [B, ..., O] for each layer.
    """
    outputs = _frozen([layer.base if isinstance(layer, StackedLoraLinear) else layer for layer in layers], x)
    stacked = [(index, layer) for index, layer in enumerate(layers) if isinstance(layer, StackedLoraLinear)]
    if not stacked:
        return outputs
    parts = [part for _, layer in stacked for part in (layer.frozen_down_RI, layer.down_RI) if part.shape[0]]
    scales = [layer.row_scale(x) for _, layer in stacked]
    rows = [scale.shape[-1] for scale in scales]
    down = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(x.dtype)
    scale = torch.cat(scales, -1)
    hidden = torch.split(F.linear(x, down) * scale, rows, dim=-1)
    for (index, layer), part in zip(stacked, hidden, strict=True):
        masked = part if layer.holder.mask is None else layer.holder.mask(layer, part)
        outputs[index] = _add_up(outputs[index], masked, layer.up().to(x.dtype))
    return outputs


def _frozen(bases: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    cls = type(bases[0])
    if issubclass(cls, FrozenLinear) and all(type(base) is cls for base in bases):
        return cls.forward_many([base for base in bases if isinstance(base, FrozenLinear)], x)
    return [base(x) for base in bases]


def _add_up(y: Tensor, hidden: Tensor, up_OR: Tensor) -> Tensor:
    """y + up · hidden; in place without gradient."""
    if torch.is_grad_enabled():
        return y + F.linear(hidden, up_OR)
    y.view(-1, y.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), up_OR.t())
    return y
