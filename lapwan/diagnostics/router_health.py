"""Health of a router during training: sums over a window of clips, thresholds on them, and advice.

Shapes: B samples, E experts. Entropies in nats. The thresholds were stated for four experts; those on usage scale with
1/E, the one on entropy with ln E.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_LOW_ENTROPY = 0.3 / math.log(4)  # as a fraction of ln E
_LEAST, _MOST = 0.2, 0.6  # as fractions of 1/E, and of the distance from 1/E to 1


@dataclass(frozen=True)
class RoutingTotals:
    """Sums over clips in one flat fp64 vector, so that a window is a difference and processes can be summed.

    In order: clips, clips with a label, Σ entropy, Σ KL of labelled clips, usage [E], usage by family [E, E] and
    confusion [E, E] (rows: the label's family, of labelled clips; columns: expert, or the router's choice).
    """

    flat: Tensor
    experts: int

    @staticmethod
    def zeros(experts: int) -> RoutingTotals:
        """The totals of no clips."""
        return RoutingTotals(torch.zeros(4 + experts + 2 * experts * experts, dtype=torch.float64), experts)

    @staticmethod
    def of(
        student_BE: Tensor, mix_BE: Tensor, label_BE: Tensor, labelled_B: Tensor, entropy_B: Tensor, kl_B: Tensor
    ) -> RoutingTotals:
        """The totals of a batch.

        Args:
            student_BE: the router's probabilities before top-k.
            mix_BE: the gates after top-k.
            label_BE: label weights.
            labelled_B: 1, or 0 for clips whose label is only a fallback.
            entropy_B, kl_B: of the student, and KL(student ‖ teacher), in nats.
        """
        experts = student_BE.shape[1]
        family_BE = torch.nn.functional.one_hot(label_BE.argmax(dim=1), experts).to(mix_BE) * labelled_B[:, None]
        chosen_BE = torch.nn.functional.one_hot(student_BE.argmax(dim=1), experts).to(mix_BE)
        parts = [
            labelled_B.new_tensor([len(labelled_B)]), labelled_B.sum().view(1), entropy_B.sum().view(1),
            (kl_B * labelled_B).sum().view(1), mix_BE.sum(dim=0), (family_BE.T @ mix_BE).flatten(),
            (family_BE.T @ chosen_BE).flatten(),
        ]
        return RoutingTotals(torch.cat(parts).double(), experts)

    def __add__(self, other: RoutingTotals) -> RoutingTotals:
        return RoutingTotals(self.flat + other.flat, self.experts)

    def __sub__(self, other: RoutingTotals) -> RoutingTotals:
        return RoutingTotals(self.flat - other.flat, self.experts)

    @property
    def clips(self) -> float:
        """Number of clips."""
        return float(self.flat[0])

    @property
    def labelled(self) -> float:
        """Number of clips whose label is not a fallback."""
        return float(self.flat[1])

    @property
    def entropy(self) -> float:
        """Mean entropy of the router before top-k."""
        return float(self.flat[2]) / max(self.clips, 1.0)

    @property
    def teacher_kl(self) -> float | None:
        """Mean KL(student ‖ teacher) of labelled clips."""
        return float(self.flat[3]) / self.labelled if self.labelled else None

    @property
    def usage_E(self) -> Tensor:
        """Each expert's share of all gates after top-k; the shares sum to 1.

        The single gate of k = 1 is not renormalised: if divided by clips, experts of an uncertain router would seem
        unused.
        """
        sums_E = self.flat[4 : 4 + self.experts]
        return sums_E / sums_E.sum().clamp_min(1e-30)

    def _square(self, start: int) -> Tensor:
        return self.flat[start : start + self.experts**2].view(self.experts, self.experts)

    @property
    def usage_by_family_EE(self) -> Tensor:
        """Mean mix of the clips of each family; rows of a family without clips are NaN."""
        sums = self._square(4 + self.experts)
        return sums / self.confusion_EE.sum(dim=1, keepdim=True)

    @property
    def confusion_EE(self) -> Tensor:
        """Labelled clips by family (rows) and the router's first choice (columns)."""
        return self._square(4 + self.experts + self.experts**2)

    @property
    def accuracy(self) -> float | None:
        """Share of labelled clips whose first choice is the label's family."""
        return float(self.confusion_EE.trace()) / self.labelled if self.labelled else None


@dataclass(frozen=True)
class RoutingThresholds:
    """Limits of a healthy router; None: the default, scaled to the number of experts."""

    entropy: float | None = None
    least_usage: float | None = None
    most_usage: float | None = None
    teacher_kl: float = 1.0

    def scaled(self, experts: int) -> tuple[float, float, float]:
        """(entropy, least usage, most usage) for E experts: 0.3 nats, 5 % and 70 % for four."""
        share = 1 / experts
        return (
            _LOW_ENTROPY * math.log(experts) if self.entropy is None else self.entropy,
            _LEAST * share if self.least_usage is None else self.least_usage,
            share + _MOST * (1 - share) if self.most_usage is None else self.most_usage,
        )


@dataclass(frozen=True)
class RoutingFault:
    """A fault of the routing: `kind` names it, `change` holds the advised settings by key."""

    kind: str
    text: str
    change: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        advice = ", ".join(f"{key} = {value:g}" for key, value in self.change.items())
        return f"{self.text}; advice: " + (f"set {advice}, and " if advice else "") + "check the label file"


# Advised values by settings key; a setting that already has its value is not advised again.
_ADVICE = {
    "collapse": {"routing_loss.balance": 0.2, "routing_loss.entropy": 0.05, "routing_loss.teacher_kl": 2.0},
    "usage": {"routing_loss.balance": 0.2, "data.balance": 1.0},
    "divergence": {"routing_loss.teacher_kl": 2.0},
}


def judge_routing(
    window: RoutingTotals, families: Sequence[str], thresholds: RoutingThresholds, current: Mapping[str, float],
    learned: bool = True,
) -> list[RoutingFault]:
    """The faults of a window: collapse, an expert used too much or too little, divergence from the teacher.

    Args:
        window: totals over the steps that are judged.
        families: in the order of the experts.
        thresholds: of each fault.
        current: the run's values of the settings that may be advised.
        learned: False for the rule router, whose entropy is the labels': only its usage is judged.
    """
    if window.experts < 2 or not window.clips:
        return []
    entropy, least, most = thresholds.scaled(window.experts)

    def fault(kind: str, advice: str, text: str) -> RoutingFault:
        change = {key: value for key, value in _ADVICE[advice].items() if current.get(key, math.inf) < value}
        return RoutingFault(kind, text, change)

    faults = []
    if learned and window.entropy < entropy:
        faults.append(fault("collapse", "collapse", f"routing entropy {window.entropy:.2f} nats, below {entropy:.2f}: "
                            "the router has collapsed"))
    for family, share in zip(families, window.usage_E.tolist(), strict=True):
        if share > most:
            faults.append(fault("overuse", "usage", f"expert '{family}' takes {share:.0%} of the gates, above "
                                f"{most:.0%}"))
        elif share < least:
            faults.append(fault("underuse", "usage", f"expert '{family}' takes {share:.1%} of the gates, below "
                                f"{least:.1%}"))
    kl = window.teacher_kl
    if learned and kl is not None and kl > thresholds.teacher_kl:
        faults.append(fault("divergence", "divergence", f"KL to the teacher {kl:.2f} nats, above "
                            f"{thresholds.teacher_kl:g}: the router has diverged from the labels"))
    return faults
