"""Does a mixture's router read the family from a caption? Its answers against the labels.

Shapes: N captions, E families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lapwan.moe.mixture import Mixture


@dataclass(frozen=True)
class RoutingScores:
    """`right_N` per caption (1 or 0), `confusion_EE` with a row a label and a column an answer, entropy in nats."""

    families: tuple[str, ...]
    right_N: np.ndarray
    confusion_EE: np.ndarray
    entropy_N: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of captions whose likeliest expert is their label's family."""
        return float(self.right_N.mean()) if len(self.right_N) else float("nan")


@torch.no_grad()
def routing_scores(
    mixture: Mixture, features: Sequence[Tensor], weights: Sequence[Sequence[float]], sigma: float = 0.5
) -> RoutingScores:
    """The router's probabilities before top-k against the labels.

    Args:
        features: text features of each caption, unpadded [n, D], on the CPU.
        weights: each caption's label weights; the largest is its family.
        sigma: where a router that sees sigma is asked.

    Raises:
        ValueError: no captions, or weights of another number of families.
    """
    if not len(features) or any(len(own) != len(mixture.families) for own in weights):
        raise ValueError(f"routing needs captions with {len(mixture.families)} label weights each")
    labels_NE = torch.tensor([list(own) for own in weights], dtype=torch.float32)
    student_NE = mixture.route(list(features), labels_NE, torch.full((len(features),), sigma)).double()
    answers, truth = student_NE.argmax(dim=1).numpy(), labels_NE.argmax(dim=1).numpy()
    confusion_EE = np.zeros((len(mixture.families),) * 2, dtype=int)
    np.add.at(confusion_EE, (truth, answers), 1)
    entropy_N = -(student_NE * student_NE.clamp_min(1e-30).log()).sum(dim=1).numpy()
    return RoutingScores(mixture.families, (answers == truth).astype(float), confusion_EE, entropy_N)
