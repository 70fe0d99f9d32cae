"""The report of `lapwan label`: counts over a labelled set, warnings and advice for training a mixture on it.

Memory does not grow with the number of clips.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lapwan.data.labels import Label
from lapwan.data.taxonomy import Taxonomy

# A family is rare below 5 % and dominant above 70 % for four families; both scale with 1/E for E families.
RARE_SHARE, DOMINANT_SHARE = 0.2, 2.8
IMBALANCE = 5.0  # largest family over smallest; above this the report warns
FALLBACK_SHARE = 0.1
SMALLEST_FAMILY = 20  # clips; below this an expert has too little to learn from, whatever the balance
_MAX_REPEAT = 10.0  # a clip drawn more than ten times its share is memorised
_EXAMPLES = 10


@dataclass
class LabelReport:
    """Accumulates labels with `add`; the figures are properties.

    `cooccurrence[i][j]` counts clips in which families i and j both have weight (the diagonal: clips with family i),
    `alone[i]` those in which only family i has.
    """

    taxonomy: Taxonomy
    clips: int = 0
    fallback: int = 0
    relabelled: int = 0
    counts: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    cooccurrence: list[list[int]] = field(default_factory=list)
    unmatched: list[tuple[int, str]] = field(default_factory=list)
    alone: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        n = len(self.taxonomy.families)
        self.counts, self.weight = [0] * n, [0.0] * n
        self.cooccurrence = [[0] * n for _ in range(n)]
        self.alone = [0] * n

    def add(self, line: int, caption: str, label: Label) -> None:
        """Count one labelled clip."""
        self.clips += 1
        self.counts[label.index] += 1
        present = [i for i, weight in enumerate(label.weights) if weight > 0]
        if len(present) == 1:
            self.alone[present[0]] += 1
        for i in present:
            self.weight[i] += label.weights[i]
            for j in present:
                self.cooccurrence[i][j] += 1
        if label.fallback:
            self.fallback += 1
            if len(self.unmatched) < _EXAMPLES:
                self.unmatched.append((line, caption))

    @property
    def names(self) -> list[str]:
        """The families' display names, in order."""
        return [family.name for family in self.taxonomy.families]

    @property
    def imbalance(self) -> float | None:
        """Largest family over smallest, in clips; None while a family has none."""
        return max(self.counts) / min(self.counts) if min(self.counts) > 0 else None

    @property
    def sampling_weights(self) -> dict[str, float]:
        """Relative frequency of drawing a clip of each family, so that families are drawn evenly.

        clips / (E · n_f), at most 10; 0 for a family without clips. Over all clips the mean is 1 unless capped.
        """
        n = len(self.counts)
        return {
            name: round(min(self.clips / (n * count), _MAX_REPEAT), 3) if count else 0.0
            for name, count in zip(self.names, self.counts, strict=True)
        }

    def warnings(self) -> list[str]:
        """Problems of the set, each with its figure."""
        if not self.clips:
            return []
        messages = []
        n = len(self.counts)
        for name, count in zip(self.names, self.counts, strict=True):
            share = count / self.clips
            if count == 0:
                messages.append(f"{name}: no clip; its expert would learn nothing")
            elif share < RARE_SHARE / n:
                messages.append(f"{name}: only {count} of {self.clips} clips ({share:.1%}, below {RARE_SHARE / n:.1%})")
            elif share > min(DOMINANT_SHARE / n, 0.95):
                messages.append(f"{name}: {share:.0%} of the clips (above {min(DOMINANT_SHARE / n, 0.95):.0%}); "
                                "routing tends to collapse onto it")
        if self.imbalance is not None and self.imbalance > IMBALANCE:
            messages.append(f"imbalance {self.imbalance:.1f}: the largest family has that many times the clips of the "
                            "smallest")
        if self.fallback > FALLBACK_SHARE * self.clips:
            messages.append(f"{self.fallback} of {self.clips} captions ({self.fallback / self.clips:.0%}) name no "
                            "instrument, so their label is a fallback; the router learns nothing from them")
        return messages

    def to_collect(self) -> dict[str, int]:
        """Clips to add by family's name, so that each has enough to learn from and none is five times another."""
        target = max(SMALLEST_FAMILY, round(max(self.counts) / IMBALANCE))
        return {name: target - count for name, count in zip(self.names, self.counts, strict=True)
                if count < target and (count < SMALLEST_FAMILY or count * IMBALANCE < max(self.counts))}

    def advice(self) -> list[str]:
        """What to do about it."""
        if not self.clips:
            return []
        n = len(self.counts)
        messages = []
        for name, missing in self.to_collect().items():
            count = self.counts[self.names.index(name)]
            messages.append(f"add about {missing} clips of {name} (has {count}, aim for {count + missing})")
        for i, name in enumerate(self.names):
            if self.cooccurrence[i][i] and not self.alone[i]:
                beside = max((j for j in range(n) if j != i), key=lambda j: self.cooccurrence[i][j])
                messages.append(f"collect clips in which {name} works alone: in every one of its "
                                f"{self.cooccurrence[i][i]} another is there, mostly {self.names[beside]}")
        if min(self.counts) > 0 and max(self.counts) * n > 1.5 * self.clips:
            weights = ", ".join(f"{family.key}={weight:g}" for family, weight in
                                zip(self.taxonomy.families, self.sampling_weights.values(), strict=True))
            messages.append(f"sample families evenly: weights {weights}")
        if self.fallback:
            messages.append("name the instrument in the captions listed as unmatched, or add their words to a taxonomy "
                            "file of your own (--taxonomy my.toml)")
        return messages

    def to_dict(self) -> dict[str, Any]:
        """The JSON report; scripts rely on the first five keys."""
        names = self.names
        return {
            "clips": self.clips,
            "families": dict(zip(names, self.counts, strict=True)),
            "fallback": self.fallback,
            "imbalance": None if self.imbalance is None else round(self.imbalance, 4),
            "cooccurrence": {
                a: dict(zip(names, row, strict=True)) for a, row in zip(names, self.cooccurrence, strict=True)
            },
            "format": 1,
            "taxonomy": {"name": self.taxonomy.name, "fingerprint": self.taxonomy.fingerprint,
                         "keys": list(self.taxonomy.keys)},
            "relabelled": self.relabelled,
            "mean_weights": {
                name: round(w / max(self.clips, 1), 4) for name, w in zip(names, self.weight, strict=True)
            },
            "sampling_weights": self.sampling_weights,
            "unmatched": [{"line": line, "caption": caption} for line, caption in self.unmatched],
            "warnings": self.warnings(),
            "advice": self.advice(),
        }
