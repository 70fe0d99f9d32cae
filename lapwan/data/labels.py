"""Chinese word boundaries, so that 呼吸 is no mention of 吸: jieba with a user dictionary made from a taxonomy."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lapwan.data.caption_text import PIECE, Found, Matcher, SplitText, is_han, normalise, stem, units, weight_length
from lapwan.data.negation import negated
from lapwan.data.taxonomy import Taxonomy
from lapwan.errors import UserError, nearest

# Word frequencies for phrases of the taxonomy, against jieba's total of 6e7. High enough that the phrase is preferred
# to its own parts, low enough that a common word across its edge wins: 呼吸|引起 has no 吸引.
_FREQUENCY = {2: 20_000}
_FREQUENCY_LONG = 200_000


class Segmenter:
    """jieba's maximum-probability segmentation with `phrases` as words; private, so it changes no global state."""

    def __init__(self, phrases: Iterable[str]) -> None:
        frequencies, total = _dictionary()
        import jieba  # after _dictionary, which silences it

        self._jieba = jieba.Tokenizer()
        self._jieba.FREQ, self._jieba.total = frequencies.copy(), total
        self._jieba.initialized = True
        for phrase in phrases:
            if len(phrase) > 1:  # a single character keeps its own frequency, or it would split common words
                wanted = _FREQUENCY.get(len(phrase), _FREQUENCY_LONG)
                self._jieba.add_word(phrase, max(wanted, frequencies.get(phrase, 0)))

    def words(self, text: str) -> list[str]:
        """Consecutive words of a run of Chinese characters."""
        # HMM off: it invents words from single characters and could swallow a keyword
        words: list[str] = self._jieba.lcut(text, HMM=False)
        return words


@lru_cache(maxsize=1)
def _dictionary() -> tuple[dict[str, int], int]:
    # Read straight from the package: jieba's own cache in a world-writable temporary folder is no faster, and trusted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jieba
    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    pair: tuple[dict[str, Any], int] = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    return pair

LENGTH_POWER = 1.5
_MIX_PUNCTUATION = str.maketrans("，；：＝", ",;:=")


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
    action: bool


class Resolver:
    """Labels captions by one taxonomy. Building one loads jieba's dictionary (half a second, once a process)."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        keywords = [_phrase(k, i) for i, family in enumerate(taxonomy.families) for k in family.keywords]
        keywords += [_phrase(word, -1) for word in taxonomy.ignore]
        actions = [_phrase(a, i, action=True) for i, family in enumerate(taxonomy.families) for a in family.actions]
        self._keywords, self._actions = Matcher(keywords), Matcher(actions)
        self._segmenter = Segmenter("".join(p) for p, _ in (*keywords, *actions) if all(map(is_han, p)))

    def label(self, caption: str) -> Label:
        """The label of a caption or prompt; see the module for the rule."""
        text = self._split(caption)
        matches = self._keywords.find(text)
        found = [f for f in matches if f.what.family >= 0]
        mentions = _judged(text, found)
        counted = [m for m in mentions if not m.negated]
        if not counted:
            found += self._actions.find(text, [(f.start, f.end) for f in matches])
            denied = {m.family for m in mentions}
            mentions = _judged(text, sorted(found, key=lambda f: f.start))
            counted = [m for m in mentions if m.action and not m.negated and m.family not in denied]
        return self._conclude(counted, tuple(mentions))

    def _split(self, caption: str) -> SplitText:
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
        return SplitText(tuple(text), (*boundary, True))

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
def _resolver(taxonomy: Taxonomy) -> Resolver:
    return Resolver(taxonomy)


def _judged(text: SplitText, found: list[Found[_Phrase]]) -> list[Mention]:
    denied = negated(text, [Found(f.start, f.end, f.what.family) for f in found])
    return [
        Mention(f.what.text, f.what.family, f.start, f.end, f.what.weight, f.what.action, no)
        for f, no in zip(found, denied, strict=True)
    ]


def _phrase(text: str, family: int, action: bool = False) -> tuple[tuple[str, ...], _Phrase]:
    pieces = units(text)
    return pieces, _Phrase(text, family, weight_length(pieces) ** LENGTH_POWER, action)
