"""From words to instrument families: one resolver for captions, prompts and hints.

Rule: w_f = Σ_{mentions m of f} len(m)^1.5 / Σ_all, over the longest match of the taxonomy's phrases on segmented text.
A mention counts once (电凝钩 is not also 电凝 and 钩) and not at all when it is negated. Length is in characters for
Chinese and two per word for Latin script.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from lapwan.data.matching import Found, Matcher, Split
from lapwan.data.negation import negated
from lapwan.data.segment import Segmenter
from lapwan.data.taxonomy import Taxonomy
from lapwan.data.text import PIECE, is_han, normalise, stem, units, weight_length
from lapwan.errors import UserError, nearest

LENGTH_POWER = 1.5
_MIX_PART = re.compile(r"\s*(?P<name>.+?)\s*(?:[:=]\s*(?P<weight>[^:=,;]+?)\s*)?")


@dataclass(frozen=True)
class Mention:
    """A phrase of the taxonomy found in a text. `start` and `end` count units of the normalised text."""

    phrase: str
    family: int
    start: int
    end: int
    weight: float
    action: bool = False
    negated: bool = False


@dataclass(frozen=True)
class Label:
    """What a caption says: `weights` in taxonomy order, sum 1; `index` and `name` of the main family.

    `fallback`: nothing in the caption counted, the label is the taxonomy's default family. `mentions`: the evidence,
    negated mentions included.
    """

    weights: tuple[float, ...]
    index: int
    name: str
    fallback: bool
    mentions: tuple[Mention, ...]


@dataclass(frozen=True)
class _Phrase:
    text: str
    family: int  # -1: a phrase to ignore
    weight: float


class Resolver:
    """Labels captions by one taxonomy. Building one loads jieba's dictionary (half a second, once a process)."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        keywords = [_phrase(k, i) for i, family in enumerate(taxonomy.families) for k in family.keywords]
        keywords += [_phrase(word, -1) for word in taxonomy.ignore]
        actions = [_phrase(a, i) for i, family in enumerate(taxonomy.families) for a in family.actions]
        self._keywords, self._actions = Matcher(keywords), Matcher(actions)
        self._segmenter = Segmenter("".join(p) for p, _ in (*keywords, *actions) if all(map(is_han, p)))

    def label(self, caption: str) -> Label:
        """The label of a caption or prompt; see the module for the rule."""
        text = self._split(caption)
        mentions = self._mentions(self._keywords, text, [], action=False)
        counted = [m for m in mentions if not m.negated]
        if not counted:
            denied = {m.family for m in mentions}
            actions = self._mentions(self._actions, text, [(m.start, m.end) for m in mentions], action=True)
            counted = [m for m in actions if not m.negated and m.family not in denied]
            mentions += actions
        return self._conclude(counted, tuple(mentions))

    def _split(self, caption: str) -> Split:
        text: list[str] = []
        boundary: list[bool] = []
        for match in PIECE.finditer(normalise(caption)):
            if match.lastgroup == "han":
                for word in self._segmenter.words(match[0]):
                    text += word
                    boundary += [True, *[False] * (len(word) - 1)]
            else:
                text.append(stem(match[0]) if match.lastgroup == "word" else match[0])
                boundary.append(True)
        return Split(tuple(text), (*boundary, True))

    def _mentions(
        self, matcher: Matcher[_Phrase], text: Split, taken: list[tuple[int, int]], action: bool
    ) -> list[Mention]:
        found = [f for f in matcher.find(text, taken) if f.what.family >= 0]
        denied = negated(text, [Found(f.start, f.end, f.what.family) for f in found])
        return [
            Mention(f.what.text, f.what.family, f.start, f.end, f.what.weight, action, no)
            for f, no in zip(found, denied, strict=True)
        ]

    def _conclude(self, counted: list[Mention], mentions: tuple[Mention, ...]) -> Label:
        families = self.taxonomy.families
        default = self.taxonomy.default
        if not counted:
            one_hot = tuple(float(i == default) for i in range(len(families)))
            return Label(one_hot, default, families[default].name, True, mentions)
        scores = [math.fsum(m.weight for m in counted if m.family == i) for i in range(len(families))]
        total = math.fsum(scores)
        first = {i: next((m.start for m in counted if m.family == i), math.inf) for i in range(len(families))}
        # A tie goes to a specific instrument before the catch-all default, then to the one mentioned first
        index = min(range(len(families)), key=lambda i: (-round(scores[i], 9), i == default, first[i]))
        return Label(tuple(s / total for s in scores), index, families[index].name, False, mentions)


def label_caption(caption: str, taxonomy: Taxonomy) -> Label:
    """The label of one caption or prompt; keep a `Resolver` for many with one taxonomy, it is the same code."""
    return _resolver(taxonomy).label(caption)


def rounded(weights: tuple[float, ...], digits: int = 3) -> list[float]:
    """Weights with `digits` decimals that still sum to 1: the largest remainders are rounded up."""
    scale = 10**digits
    floors = [math.floor(weight * scale + 1e-9) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (floors[i] - weights[i] * scale, -weights[i], i))
    for i in by_remainder[: scale - sum(floors)]:
        floors[i] += 1
    return [floor / scale for floor in floors]


def resolve_hint(text: str, taxonomy: Taxonomy) -> tuple[float, ...]:
    """Family weights (taxonomy order, sum 1) of what a user types as a hint.

    A family by any of its names (`hook`, `Hook/Electrocautery`, `电凝钩`, `Other`), an instrument (`grasper`), a phrase
    as in a caption, or a mix `hook:0.7,suction:0.3` (`=` for `:`, parts without a number weigh the same); the numbers
    of a mix are divided by their sum.

    Raises:
        UserError: a name without a family, a weight that is no number >= 0, a mix that sums to 0.
    """
    names = _hint_names(taxonomy)
    if (index := names.get(units(text))) is not None:
        return _one_hot(index, taxonomy)
    parts = [part for part in re.split(r"[,;、]", normalise_mix(text)) if part.strip()]
    if not parts:
        raise UserError(f"empty hint; {_allowed(taxonomy)}")
    if len(parts) == 1 and not re.search(r"[:=]", parts[0]):
        return _hint_part(parts[0], taxonomy)
    total = [0.0] * len(taxonomy.families)
    for part in parts:
        match = _MIX_PART.fullmatch(part)
        if match is None:
            raise UserError(f"hint part '{part.strip()}': expected name:weight, such as hook:0.7")
        weight = _hint_weight(match["weight"], part)
        for i, share in enumerate(_hint_part(match["name"], taxonomy)):
            total[i] += weight * share
    if not math.fsum(total) > 0:
        raise UserError(f"hint '{text}': the weights sum to 0; give one family a weight above 0")
    return tuple(value / math.fsum(total) for value in total)


def normalise_mix(text: str) -> str:
    """Full-width punctuation of a mix in its ASCII form; letters and hyphens stay for the messages."""
    return text.translate(str.maketrans("，；：＝", ",;:="))


def _hint_part(text: str, taxonomy: Taxonomy) -> tuple[float, ...]:
    if (index := _hint_names(taxonomy).get(units(text))) is not None:
        return _one_hot(index, taxonomy)
    label = label_caption(text, taxonomy)
    if label.fallback:
        known = [hint for family in taxonomy.families for hint in family.hints]
        raise UserError(f"unknown instrument '{text.strip()}'{nearest(text.strip(), known)}; {_allowed(taxonomy)}")
    return label.weights


def _hint_weight(text: str | None, part: str) -> float:
    if text is None:
        return 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise UserError(f"hint part '{part.strip()}': weight '{text}' must be a number of 0 or more, such as hook:0.7")
    return weight


def _allowed(taxonomy: Taxonomy) -> str:
    names = ", ".join(f"{f.key} ({'/'.join(f.names_zh)})" if f.names_zh else f.key for f in taxonomy.families)
    return f"allowed in {taxonomy.name}: {names}, one of their words, or a mix such as " \
           f"{taxonomy.families[0].key}:0.7,{taxonomy.families[1].key}:0.3"


def _one_hot(index: int, taxonomy: Taxonomy) -> tuple[float, ...]:
    return tuple(float(i == index) for i in range(len(taxonomy.families)))


@lru_cache(maxsize=8)
def _hint_names(taxonomy: Taxonomy) -> dict[tuple[str, ...], int]:
    return {units(hint): i for i, family in enumerate(taxonomy.families) for hint in family.hints}


@lru_cache(maxsize=8)
def _resolver(taxonomy: Taxonomy) -> Resolver:
    return Resolver(taxonomy)


def _phrase(text: str, family: int) -> tuple[tuple[str, ...], _Phrase]:
    pieces = units(text)
    return pieces, _Phrase(text, family, weight_length(pieces) ** LENGTH_POWER)
