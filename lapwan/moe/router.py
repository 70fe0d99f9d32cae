"""Routers: from what is known of a clip to a probability for each expert.

Shapes: B samples, n tokens of a text, D text features, E experts.
How to add a router: a class with `logits` and `kind`, a row in `make_router`, a settings member.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

RouterKind = Literal["text", "label", "rule"]
_WIDE, _NARROW = 512, 64  # the users' router: LayerNorm -> 512 -> 64 -> E


def masked_mean(text: Sequence[Tensor]) -> Tensor:
    """Mean over each text's own tokens, padding left out: list of [n, D] -> [B, D] fp32."""
    return torch.stack([features.float().mean(dim=0) for features in text])


class TextRouter(nn.Module):
    """p = softmax(MLP(LayerNorm(mean of the text features)) / T): learns the family from the prompt itself."""

    def __init__(self, text_dim: int, experts: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.text_dim, self.temperature = text_dim, temperature
        self.mlp = nn.Sequential(
            nn.LayerNorm(text_dim), nn.Linear(text_dim, _WIDE), nn.GELU(), nn.Linear(_WIDE, _NARROW), nn.GELU(),
            nn.Linear(_NARROW, experts),
        )

    def forward(self, text: Sequence[Tensor], labels_BE: Tensor | None) -> Tensor:
        means_BD = masked_mean(text).to(next(self.mlp.parameters()))
        logits: Tensor = self.mlp(means_BD)
        return torch.softmax(logits / self.temperature, dim=-1)


class LabelRouter(nn.Module):
    """p = softmax(W·label weights / T): learns from labels only, for captions in a language the encoder reads badly."""

    def __init__(self, experts: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.linear = nn.Linear(experts, experts)
        with torch.no_grad():  # starts near the rule: a family's own expert is the likeliest
            self.linear.weight.copy_(torch.eye(experts))
            self.linear.bias.zero_()

    def forward(self, text: Sequence[Tensor], labels_BE: Tensor | None) -> Tensor:
        logits: Tensor = self.linear(_needed(labels_BE).to(self.linear.weight))
        return torch.softmax(logits / self.temperature, dim=-1)


class RuleRouter(nn.Module):
    """p = the label weights themselves: nothing to learn, no softmax, no top-k."""

    def forward(self, text: Sequence[Tensor], labels_BE: Tensor | None) -> Tensor:
        return _needed(labels_BE).float()


def _needed(labels_BE: Tensor | None) -> Tensor:
    if labels_BE is None:
        raise ValueError("this router needs label weights")
    return labels_BE


def make_router(kind: RouterKind, text_dim: int, experts: int, temperature: float = 1.0) -> nn.Module:
    """The router of a kind; its weights come from torch's default generator."""
    match kind:
        case "text":
            return TextRouter(text_dim, experts, temperature)
        case "label":
            return LabelRouter(experts, temperature)
        case "rule":
            return RuleRouter()


def select_top_k(probabilities_BE: Tensor, k: int) -> Tensor:
    """Keep the k largest of each row; renormalise to 1 for k ≥ 2.

    Not for k = 1: a renormalised single gate is the constant 1 and would get no gradient.
    """
    if k >= probabilities_BE.shape[-1]:
        return probabilities_BE
    kept = probabilities_BE.topk(k, dim=-1).indices
    mask = torch.zeros_like(probabilities_BE).scatter(-1, kept, 1.0)
    selected = probabilities_BE * mask
    return selected if k == 1 else selected / selected.sum(dim=-1, keepdim=True)
