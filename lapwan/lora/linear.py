"""What a low-rank layer can sit on: an nn.Linear, or a frozen linear map that keeps its weight in another form."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FrozenLinear(nn.Module):
    """y = W̃ x + b with a W̃ that is never trained. x is [..., I] in a floating dtype, y [..., O] in the same.

    The gradient with respect to x is g W̃; none of W or b.
    How to add a form of weight: a subclass with these two methods, whose tensors are buffers.
    """

    weight: None = None  # transformers' T5 looks for one to cast its input to; there is none

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next(self.buffers()).device

    @abstractmethod
    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """W̃ in `dtype`, [O, I], made anew at every call."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""

    @classmethod
    def together(cls, layers: Sequence[FrozenLinear], x: Tensor) -> list[Tensor]:
        """`[layer(x) for layer in layers]` of this class: what a form computes of x alone may be computed once."""
        return [layer(x) for layer in layers]


def device_of(base: nn.Linear | FrozenLinear) -> torch.device:
    """Where a linear's weight is."""
    return base.weight.device if isinstance(base, nn.Linear) else base.device
