"""The mix of experts for a video: from a hint, the learned router, or the rule router (keywords of the prompt).

Shapes: E experts of the mixture (families of its taxonomy, in order); a leading 1 is the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lapwan.data.labels import label_caption, resolve_hint
from lapwan.data.taxonomy import Taxonomy
from lapwan.errors import UserError
from lapwan.moe.mixture import Mixture

_BAR = 24  # characters of a full bar


@dataclass(frozen=True)
class Mix:
    """g, the experts' shares for one video, and their source.

    If the router sees sigma, `by_sigma` holds the mix of every denoising step and `mix_1E` their mean.
    """

    families: tuple[str, ...]
    mix_1E: Tensor
    source: Literal["hint", "router", "rule"]
    by_sigma: Mapping[float, Tensor] = field(default_factory=dict)

    def at(self, sigma: float) -> Tensor:
        """The mix of a denoising step: [1, E]."""
        return self.by_sigma[sigma] if self.by_sigma else self.mix_1E

    def shares(self) -> dict[str, float]:
        """Share by family."""
        return dict(zip(self.families, self.mix_1E[0].tolist(), strict=True))

    def bars(self) -> list[str]:
        """A line per family: name, bar, share."""
        width = max(len(name) for name in self.families)
        bars = {name: "█" * round(share * _BAR) for name, share in self.shares().items()}
        return [f"{name:<{width}}  {bars[name]:<{_BAR}}  {share:.2f}" for name, share in self.shares().items()]


def choose_mix(
    mixture: Mixture, prompt: str, hint: str | None, features: Callable[[], Tensor], sigmas: Sequence[float] = ()
) -> Mix:
    """The mix for a prompt: the hint's weights unchanged (no softmax, no top-k), else the output of the router.

    Args:
        features: returns the prompt's unpadded text features [n, D]; called only if the router reads text.
        sigmas: of the denoising steps, in order; needed if the router sees sigma.
    """
    taxonomy = Taxonomy.from_dict(mixture.taxonomy)
    if hint is not None:
        return Mix(mixture.families, torch.tensor([resolve_hint(hint, taxonomy)]), "hint")
    reads_text = mixture.router.reads_text
    text = [features()] if reads_text else []
    labels_1E = None if reads_text else torch.tensor([label_caption(prompt, taxonomy).weights])
    source: Literal["router", "rule"] = "router" if mixture.router.learned else "rule"
    if not mixture.spec.router_sigma:
        return Mix(mixture.families, mixture.select(mixture.route(text, labels_1E)), source)
    by_sigma = dict(zip(sigmas, mixture.route_over_sigmas(text, labels_1E, sigmas), strict=True))
    return Mix(mixture.families, torch.stack(list(by_sigma.values())).mean(dim=0), source, by_sigma)


def alpha_vector(mixture: Mixture, alpha: float | Mapping[str, float] | None) -> Tensor | None:
    """α_e by column: one number for all, or by family (a key or any of its names); families not named keep 1.

    Raises:
        UserError: a name that does not mean a single family, or a number that is not finite.
    """
    if alpha is None:
        return None
    by_name: Mapping[str, float] = alpha if isinstance(alpha, Mapping) else dict.fromkeys(mixture.families, alpha)
    values_E = torch.ones(len(mixture.families))
    taxonomy = Taxonomy.from_dict(mixture.taxonomy)
    for name, value in by_name.items():
        if not math.isfinite(value):
            raise UserError(f"alpha-expert {name}={value}: must be a finite number")
        weights = resolve_hint(name, taxonomy)
        if max(weights) < 1.0:
            raise UserError(f"alpha-expert '{name}' means several families; name one of {', '.join(mixture.families)}")
        values_E[weights.index(max(weights))] = float(value)
    return values_E
