"""Accuracy of a mixture's router on captions, and of a linear probe of the frozen text features, the ceiling of any
text router.

The probe is a ridge regression of one-hot classes on mean-pooled features, W = (XᵀX + λI)⁻¹ XᵀY; the class with the
largest output is its prediction.
Shapes: N captions, E families, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lapwan.data.labels import resolve_hint
from lapwan.data.taxonomy import Taxonomy
from lapwan.moe.mixture import Mixture

_RIDGE = 1e-2


@dataclass(frozen=True)
class RoutingScores:
    """`right_N` is 1 or 0 per caption; `confusion_EE` has a row per label and a column per choice; entropy in nats."""

    families: tuple[str, ...]
    right_N: np.ndarray
    confusion_EE: np.ndarray
    entropy_N: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of captions whose first choice is their label's family."""
        return float(self.right_N.mean()) if len(self.right_N) else float("nan")


@torch.no_grad()
def routing_scores(
    mixture: Mixture, features: Sequence[Tensor], weights: Sequence[Sequence[float]], sigma: float = 0.5
) -> RoutingScores:
    """The router's probabilities before top-k against the labels.

    Args:
        features: text features of each caption, unpadded [n, D], on the CPU.
        weights: each caption's label weights; the largest is its family.
        sigma: at which a router that reads sigma is evaluated.

    Raises:
        ValueError: no captions, or weights of another number of families.
    """
    if not len(features) or any(len(caption_weights) != len(mixture.families) for caption_weights in weights):
        raise ValueError(f"routing needs captions with {len(mixture.families)} label weights each")
    labels_NE = torch.tensor([list(caption_weights) for caption_weights in weights], dtype=torch.float32)
    student_NE = mixture.route(list(features), labels_NE, torch.full((len(features),), sigma)).double()
    choices_N, truth_N = student_NE.argmax(dim=1).numpy(), labels_NE.argmax(dim=1).numpy()
    confusion_EE = np.zeros((len(mixture.families),) * 2, dtype=int)
    np.add.at(confusion_EE, (truth_N, choices_N), 1)
    entropy_N = -(student_NE * student_NE.clamp_min(1e-30).log()).sum(dim=1).numpy()
    return RoutingScores(mixture.families, (choices_N == truth_N).astype(float), confusion_EE, entropy_N)


@dataclass(frozen=True)
class ProbeCaption:
    """A caption and the name of its class, which a taxonomy accepts as a hint; `held_out`: not used for fitting."""

    text: str
    label: str
    held_out: bool = False


@dataclass(frozen=True)
class ProbeSet:
    """Captions to fit a probe on, some of them held out, and the name of the set in the results."""

    name: str
    captions: Sequence[ProbeCaption]


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy on the fitted and on the held-out captions, and their number."""

    fitted: float
    held_out: float
    captions: int


def _pooled(features: Sequence[Tensor]) -> Tensor:
    return torch.stack([rows.double().mean(dim=0) for rows in features])


@dataclass(frozen=True)
class LinearProbe:
    """W, and the mean and deviation of the features that it was fitted on."""

    weights: Tensor
    mean: Tensor
    deviation: Tensor

    def predict(self, features: Sequence[Tensor]) -> np.ndarray:
        """[N] the class with the largest output."""
        classes_N: np.ndarray = (self._inputs(_pooled(features)) @ self.weights).argmax(dim=1).numpy()
        return classes_N

    def _inputs(self, pooled_ND: Tensor) -> Tensor:
        x = (pooled_ND - self.mean) / self.deviation
        return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)


def fit_probe(features: Sequence[Tensor], classes_N: Tensor, count: int) -> LinearProbe:
    """Ridge regression of one-hot classes on standardised mean-pooled features with a constant.

    Args:
        features: [n tokens, D] of each caption.
        classes_N: index of each caption's class, below `count`.
    """
    pooled = _pooled(features)
    probe = LinearProbe(torch.empty(0), pooled.mean(dim=0), pooled.std(dim=0))
    x, y = probe._inputs(pooled), torch.eye(count, dtype=torch.float64)[classes_N]
    ridge = _RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    return replace(probe, weights=torch.linalg.solve(x.T @ x + ridge, x.T @ y))


def measure_probe(captions: Sequence[ProbeCaption], features: Sequence[Tensor]) -> ProbeResult:
    """Fit on the captions that are not held out, and predict all.

    Args:
        features: of each caption, [n tokens, D].
    """
    names = list(dict.fromkeys(caption.label for caption in captions))
    classes_N = np.array([names.index(caption.label) for caption in captions])
    held_out_N = np.array([caption.held_out for caption in captions])
    fitted = [rows for rows, held_out in zip(features, held_out_N, strict=True) if not held_out]
    probe = fit_probe(fitted, torch.from_numpy(classes_N[~held_out_N]), len(names))
    right_N = probe.predict(features) == classes_N
    return ProbeResult(float(right_N[~held_out_N].mean()), float(right_N[held_out_N].mean()), len(captions))


def family_probe(captions: Sequence[ProbeCaption], features: Sequence[Tensor], taxonomy: Taxonomy) -> LinearProbe:
    """A probe of the taxonomy's families, fitted on all captions."""
    family = {name: int(np.argmax(resolve_hint(name, taxonomy))) for name in {caption.label for caption in captions}}
    return fit_probe(features, torch.tensor([family[caption.label] for caption in captions]), len(taxonomy.families))
