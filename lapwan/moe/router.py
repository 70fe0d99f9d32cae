"""Routers: from the text or label features of a clip, and optionally sigma, to a probability for each expert.

Shapes: B samples, n tokens of a text, D text features, E experts, S sigma features, N width of the layer sigma enters.

How to add a router: a subclass of `Router` with its `kind`, here, and that kind in `RouterSettings.kind`
(lapwan/settings/train_moe.py). The mixture's file holds its tensors as `router.*`; `make` must give their shapes again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lapwan.errors import UserError, nearest

_HIDDEN = (512, 64)  # widths of the hidden layers: LayerNorm -> 512 -> 64 -> E
_SIGMA_FEATURES = 8


def masked_mean(text: Sequence[Tensor]) -> Tensor:
    """Mean over each text's tokens, without padding: list of [n, D] -> [B, D] fp32."""
    return torch.stack([features.float().mean(dim=0) for features in text])


def sigma_features(sigma_B: Tensor) -> Tensor:
    """cos(π·k·σ), k = 1..8: [B] -> [B, S]."""
    return torch.cos(math.pi * torch.arange(1, _SIGMA_FEATURES + 1).to(sigma_B) * sigma_B[:, None])


class _SigmaInput(nn.Module):
    """Adds U·φ(σ) to a router's hidden values; U is zero at the start. The identity for a router without sigma."""

    def __init__(self, width: int, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled
        if enabled:
            self.weight = nn.Parameter(torch.zeros(width, _SIGMA_FEATURES))

    def forward(self, hidden_BN: Tensor, sigma_B: Tensor | None) -> Tensor:
        if not self.enabled:
            return hidden_BN
        if sigma_B is None:
            raise ValueError("this router needs sigma")
        return hidden_BN + sigma_features(sigma_B.to(hidden_BN)) @ self.weight.T


@dataclass(frozen=True)
class RouterShape:
    """What a router is made from. `sigma`: it also gets sigma."""

    text_dim: int
    experts: int
    temperature: float = 1.0
    sigma: bool = False


class Router(nn.Module):
    """Probabilities of the experts: (text, label weights, sigma) -> [B, E].

    `reads_text`: from text features, else from label weights. `learned`: its top-k experts are used, and its entropy
    and lr matter; False: its output is used as it is. `may_diverge`: at a large lr.
    """

    kinds: ClassVar[dict[str, type[Router]]] = {}
    kind: ClassVar[str]
    reads_text: ClassVar[bool] = False
    learned: ClassVar[bool] = True
    may_diverge: ClassVar[bool] = True

    def __init_subclass__(cls, kind: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = kind
        Router.kinds[kind] = cls

    @classmethod
    def make(cls, shape: RouterShape) -> Router:
        """A new router, initialised with torch's default generator."""
        raise NotImplementedError

    def forward(self, text: Sequence[Tensor], labels_BE: Tensor | None, sigma_B: Tensor | None = None) -> Tensor:
        """Probabilities before top-k: [B, E].

        Args:
            text: one unpadded [n, D] tensor of text features per sample.
            labels_BE: label weights, for routers that read them.
            sigma_B: noise levels, for a router with sigma.
        """
        raise NotImplementedError


def router_class(kind: str) -> type[Router]:
    """The router of a kind.

    Raises:
        UserError: an unknown kind, as in the file of a later version.
    """
    if kind not in Router.kinds:
        raise UserError(f"no router of kind '{kind}'{nearest(kind, Router.kinds)}; known kinds: "
                        f"{', '.join(Router.kinds)}; update lapwan if the mixture is from a later version")
    return Router.kinds[kind]


class TextRouter(Router, kind="text"):
    """p = softmax(MLP(LayerNorm(mean of the text features)) / T): learns the family from the prompt.

    Without hidden layers, softmax((W·LayerNorm(mean) + b) / T): less overfitting with few captions.

    Args:
        text_dim: D of the text features.
        experts: E.
        temperature: T, above 0.
        sigma: reads the noise level too.
        hidden: widths of the hidden layers.
    """

    reads_text = True

    def __init__(
        self, text_dim: int, experts: int, temperature: float = 1.0, sigma: bool = False,
        hidden: Sequence[int] = _HIDDEN,
    ) -> None:
        super().__init__()
        self.text_dim, self.temperature = text_dim, temperature
        widths = (text_dim, *hidden, experts)
        layers: list[nn.Module] = [nn.LayerNorm(text_dim)]
        for in_features, out_features in pairwise(widths):
            layers += [nn.Linear(in_features, out_features), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.sigma = _SigmaInput(widths[1], sigma)

    @classmethod
    def make(cls, shape: RouterShape) -> Router:
        return cls(shape.text_dim, shape.experts, shape.temperature, shape.sigma)

    def forward(self, text: Sequence[Tensor], labels_BE: Tensor | None, sigma_B: Tensor | None = None) -> Tensor:
        means_BD = masked_mean(text).to(next(self.mlp.parameters()))
        logits: Tensor = self.mlp[2:](self.sigma(self.mlp[:2](means_BD), sigma_B))
        return torch.softmax(logits / self.temperature, dim=-1)


class LinearTextRouter(TextRouter, kind="linear"):
    """The text router without hidden layers."""

    may_diverge = False

    @classmethod
    def make(cls, shape: RouterShape) -> Router:
        return cls(shape.text_dim, shape.experts, shape.temperature, shape.sigma, hidden=())


class LabelRouter(Router, kind="label"):
    """p = softmax((W·label weights + b) / T): for captions in a language that the text encoder encodes badly.

    Args:
        experts: E.
        temperature: T, above 0.
        sigma: reads the noise level too.
    """

    def __init__(self, experts: int, temperature: float = 1.0, sigma: bool = False) -> None:
        super().__init__()
        self.temperature = temperature
        self.linear = nn.Linear(experts, experts)
        with torch.no_grad():  # starts close to the rule router: a family's expert is the most probable
            self.linear.weight.copy_(torch.eye(experts))
            self.linear.bias.zero_()
        self.sigma = _SigmaInput(experts, sigma)

    @classmethod
    def make(cls, shape: RouterShape) -> Router:
        return cls(shape.experts, shape.temperature, shape.sigma)

    def forward(self, text: Sequence[Tensor], labels_BE: Tensor | None, sigma_B: Tensor | None = None) -> Tensor:
        logits: Tensor = self.sigma(self.linear(_required(labels_BE).to(self.linear.weight)), sigma_B)
        return torch.softmax(logits / self.temperature, dim=-1)


class RuleRouter(Router, kind="rule"):
    """p = the label weights: no parameters, no softmax, no top-k."""

    learned = False
    may_diverge = False

    @classmethod
    def make(cls, shape: RouterShape) -> Router:
        return cls()

    def forward(self, text: Sequence[Tensor], labels_BE: Tensor | None, sigma_B: Tensor | None = None) -> Tensor:
        return _required(labels_BE).float()


def _required(labels_BE: Tensor | None) -> Tensor:
    if labels_BE is None:
        raise ValueError("this router needs label weights")
    return labels_BE


def select_top_k(probabilities_BE: Tensor, k: int) -> Tensor:
    """Keep the k largest of each row; renormalise to 1 for k ≥ 2.

    Not for k = 1: a single renormalised gate would be the constant 1, without gradient.

    Args:
        probabilities_BE: rows that sum to 1.
        k: experts to keep, at least 1; with k ≥ E nothing is dropped.
    """
    if k >= probabilities_BE.shape[-1]:
        return probabilities_BE
    kept = probabilities_BE.topk(k, dim=-1).indices
    mask = torch.zeros_like(probabilities_BE).scatter(-1, kept, 1.0)
    selected = probabilities_BE * mask
    return selected if k == 1 else selected / selected.sum(dim=-1, keepdim=True)
