"""The instrument label of a caption: which families it names, with weights, by the words of a taxonomy.

The rule: find keywords (longest match on word boundaries, `caption_text.py`), leave out those that are denied
(`negation.py`), those of `ignore`, and what is no instrument at work (`mention_roles.py`). Only if no keyword counts,
actions count instead; without either, the label is the taxonomy's default family, as a fallback. A mention weighs
length^1.5; a family's weight is its share of the sum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from lapwan.data.caption_text import (
    ChineseSegmenter,
    PhraseMatch,
    PhraseMatcher,
    SplitText,
    is_han,
    units,
    weight_length,
)
from lapwan.data.mention_roles import NO_FAMILY, RoleMention, Weight, part_in, weigh
from lapwan.data.mention_words import MODIFIERS
from lapwan.data.negation import negated
from lapwan.data.taxonomy import PARTS, Family, Taxonomy
from lapwan.errors import UserError, nearest

LENGTH_POWER = 1.5
_MIX_PUNCTUATION = str.maketrans("，；：＝", ",;:=")


@dataclass(frozen=True)
class Mention:
    """An occurrence of a taxonomy's phrase in a text. `start` and `end` count units of the normalised text.

    `negated`: the text denies it. `counted`: it is part of the label's evidence.
    """

    phrase: str
    family: int
    start: int
    end: int
    weight: float
    action: bool = False
    negated: bool = False
    counted: bool = False


@dataclass(frozen=True)
class Label:
    """The label of a caption: `weights` in taxonomy order, sum 1; `index` and `name` of the main family.

    `fallback`: no mention counted, the label is the taxonomy's default family. `mentions`: the evidence, negated
    mentions included.
    """

    weights: tuple[float, ...]
    index: int
    name: str
    fallback: bool
    mentions: tuple[Mention, ...]


_IGNORED = -1


@dataclass(frozen=True)
class _Phrase:
    text: str
    family: int  # or _IGNORED, NO_FAMILY
    weight: float
    action: bool
    parts: tuple[str, ...]


class CaptionLabeller:
    """Labels captions by one taxonomy. The first one loads jieba's dictionary (half a second, once per process)."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        keywords = [_phrase(k, i, family) for i, family in enumerate(taxonomy.families) for k in family.keywords]
        keywords += [_phrase(word, _IGNORED) for word in taxonomy.ignore]
        keywords += [_phrase(word, NO_FAMILY) for word in taxonomy.no_family]
        actions = [_phrase(a, i, family, action=True) for i, family in enumerate(taxonomy.families)
                   for a in family.actions]
        self._keywords, self._actions = PhraseMatcher(keywords, MODIFIERS), PhraseMatcher(actions, MODIFIERS)
        chinese = {"".join(p): word for p, word in (*keywords, *actions) if all(map(is_han, p))}
        self._segmenter = ChineseSegmenter(chinese, [text for text, word in chinese.items() if "verb" in word.parts])

    def label(self, caption: str) -> Label:
        """The label of a caption or prompt; see the module for the rule."""
        text = self._segmenter.split(caption)
        keywords = self._keywords.find(text)
        evidence = _Evidence.of(text, keywords)
        counted = evidence.counted(Weight.FULL)
        if not counted:
            actions = self._actions.find(text, [(match.start, match.end) for match in keywords])
            denied = {match.value.family for match in evidence.denied() if match.value.family >= 0}
            evidence = _Evidence.of(text, sorted([*keywords, *actions], key=lambda match: match.start))
            for weight in (Weight.FULL, Weight.LAST_RESORT):
                counted = {at for at in evidence.counted(weight) if evidence.matches[at].value.family not in denied}
                if counted:
                    break
        mentions = evidence.mentions(counted)
        return self._to_label([m for m in mentions if m.counted], mentions)

    def _to_label(self, counted: list[Mention], mentions: tuple[Mention, ...]) -> Label:
        families = self.taxonomy.families
        default = self.taxonomy.default
        if not counted:
            one_hot = tuple(float(i == default) for i in range(len(families)))
            return Label(one_hot, default, families[default].name, True, mentions)
        scores = [math.fsum(m.weight for m in counted if m.family == i) for i in range(len(families))]
        total = math.fsum(scores)
        first = {i: next((m.start for m in counted if m.family == i), math.inf) for i in range(len(families))}
        # A tie goes to a specific instrument before the catch-all default, then to the family mentioned first
        index = min(range(len(families)), key=lambda i: (-round(scores[i], 9), i == default, first[i]))
        return Label(tuple(s / total for s in scores), index, families[index].name, False, mentions)


def label_caption(caption: str, taxonomy: Taxonomy) -> Label:
    """The label of one caption or prompt, by `CaptionLabeller`; for many captions, keep one of those."""
    return _labeller(taxonomy).label(caption)


def round_weights(weights: tuple[float, ...], digits: int = 3) -> list[float]:
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
        UserError: a name without a family, a weight that is not a number >= 0, a mix that sums to 0.
    """
    if (index := _hint_names(taxonomy).get(units(text))) is not None:
        return _one_hot(index, taxonomy)
    parts = [part.strip() for part in re.split(r"[,;、]", text.translate(_MIX_PUNCTUATION)) if part.strip()]
    if not parts:
        raise UserError(f"empty hint; {_allowed(taxonomy)}")
    split = [re.split(r"[:=]", part) for part in parts]
    if len({len(pieces) for pieces in split}) > 1 or len(split[0]) > 2:
        raise UserError(f"hint '{text}': write every part as name:weight, or every part as a name alone, "
                        "such as hook:0.7,suction:0.3")
    total = [0.0] * len(taxonomy.families)
    for name, *weight in split:
        scale = _hint_weight(weight[0], text) if weight else 1.0
        for i, share in enumerate(_hint_part(name.strip(), taxonomy)):
            total[i] += scale * share
    if not math.fsum(total) > 0:
        raise UserError(f"hint '{text}': the weights sum to 0; give one family a weight above 0")
    return tuple(value / math.fsum(total) for value in total)


def _hint_part(text: str, taxonomy: Taxonomy) -> tuple[float, ...]:
    if (index := _hint_names(taxonomy).get(units(text))) is not None:
        return _one_hot(index, taxonomy)
    label = label_caption(text, taxonomy)
    if label.fallback:
        known = [hint for family in taxonomy.families for hint in family.hints]
        raise UserError(f"unknown instrument '{text}'{nearest(text, known)}; {_allowed(taxonomy)}")
    return label.weights


def _hint_weight(weight: str, text: str) -> float:
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"hint '{text}': weight '{weight.strip()}' must be a number of 0 or more, such as hook:0.7")
    return value


def _allowed(taxonomy: Taxonomy) -> str:
    names = ", ".join(f"{f.key} ({'/'.join(f.names_zh)})" if f.names_zh else f.key for f in taxonomy.families)
    return f"allowed in {taxonomy.name}: {names}, one of their words, or a mix such as " \
           f"{taxonomy.families[0].key}:0.7,{taxonomy.families[1].key}:0.3"


def _one_hot(index: int, taxonomy: Taxonomy) -> tuple[float, ...]:
    return tuple(float(i == index) for i in range(len(taxonomy.families)))


@lru_cache(maxsize=8)
def _hint_names(taxonomy: Taxonomy) -> dict[tuple[str, ...], int]:
    return {units(hint): i for i, family in enumerate(taxonomy.families) for hint in family.hints}


@lru_cache(maxsize=4)  # each holds a dictionary of some 40 MB
def _labeller(taxonomy: Taxonomy) -> CaptionLabeller:
    return CaptionLabeller(taxonomy)


@dataclass(frozen=True)
class _Evidence:
    """The matches of a text, which of them it denies, and how much the others count."""

    matches: list[PhraseMatch[_Phrase]]
    negated: list[bool]
    weights: list[Weight]

    @staticmethod
    def of(text: SplitText, matches: list[PhraseMatch[_Phrase]]) -> _Evidence:
        parts = {m: part_in(text, m.start, m.end, m.value.parts) for m in matches if m.value.family != _IGNORED}
        matches = [m for m, part in parts.items() if part is not None]
        denied = negated(text, [PhraseMatch(m.start, m.end, m.value.family) for m in matches])
        return _Evidence(matches, denied, weigh(text, [
            RoleMention(m.start, m.end, m.value.family, "verb" if m.value.action else parts[m] or "", no)
            for m, no in zip(matches, denied, strict=True)
        ]))

    def counted(self, weight: Weight) -> set[int]:
        return {at for at, match in enumerate(self.matches)
                if match.value.family >= 0 and self.weights[at] >= weight}

    def denied(self) -> list[PhraseMatch[_Phrase]]:
        return [match for match, no in zip(self.matches, self.negated, strict=True) if no]

    def mentions(self, counted: set[int]) -> tuple[Mention, ...]:
        return tuple(
            Mention(m.value.text, m.value.family, m.start, m.end, m.value.weight, m.value.action, self.negated[at],
                    at in counted)
            for at, m in enumerate(self.matches) if m.value.family >= 0
        )


@lru_cache(maxsize=64)
def _all_units(words: tuple[str, ...]) -> frozenset[tuple[str, ...]]:
    return frozenset(map(units, words))


def _phrase(
    text: str, family: int, words: Family | None = None, action: bool = False
) -> tuple[tuple[str, ...], _Phrase]:
    pieces = units(text)
    parts = tuple(part.removesuffix("s") for part in PARTS if words and pieces in _all_units(getattr(words, part)))
    return pieces, _Phrase(text, family, weight_length(pieces) ** LENGTH_POWER, action, parts)


def check_label(
    start: str, weights: Sequence[float] | None, family: int | None, taxonomy: Taxonomy, advice: str,
    family_key: str = "label",
) -> None:
    """Refuse a stored label of another taxonomy.

    Args:
        start: of the message: whose label it is.
        family: the index of a family, where the label is hard; `family_key`: what the file calls it.
        advice: the end of the message.

    Raises:
        UserError: weights of another number of families, or a family that the taxonomy does not have.
    """
    count = len(taxonomy.families)
    if weights is not None and len(weights) != count:
        label = f"{len(weights)} label weights"
    elif family is not None and family >= count:
        label = f"{family_key} {family}"
    else:
        return
    raise UserError(f"{start}{label}, but taxonomy {taxonomy.name} has {count} families; {advice}")
