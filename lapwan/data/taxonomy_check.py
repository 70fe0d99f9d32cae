"""The check of a taxonomy: phrases that are not read as their family, words that mean two things, what captions match.

`Taxonomy.from_dict` refuses what cannot be (a phrase in two families); this finds what is allowed and still surprises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lapwan.data.caption_text import is_han, units
from lapwan.data.labels import CaptionLabeller
from lapwan.data.taxonomy import Taxonomy

# English words that captions use as a noun and as a verb, or as an adjective, in another meaning than an instrument's.
_TWO_PARTS = frozenset("""
    saw clip clamp staple drain clear clean hold cut spread tear drill file plane probe press bag tie sound seal stitch
    pick wash burn score light view scope fan hammer punch rasp
""".split())
_EXAMPLES = 2


@dataclass
class PhraseUse:
    """How often captions match a phrase, how often it counted, and examples."""

    phrase: str
    family: str
    matched: int = 0
    counted: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class TaxonomyUse:
    """What captions match of a taxonomy. `silent`: captions without any evidence, as (location, caption)."""

    captions: int = 0
    phrases: dict[tuple[str, str], PhraseUse] = field(default_factory=dict)
    silent: list[tuple[str, str]] = field(default_factory=list)
    several: int = 0
    unused: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of it."""
        return {"captions": self.captions, "several_families": self.several, "unused_phrases": dict(self.unused),
                "without_evidence": [{"location": at, "caption": text} for at, text in self.silent],
                "phrases": [vars(use) for use in self.phrases.values()]}


def conflicts(taxonomy: Taxonomy) -> list[str]:
    """What a taxonomy's author should know, one line each; empty if there is nothing."""
    labeller = CaptionLabeller(taxonomy)
    lines = list(_misread(labeller))
    for family in taxonomy.families:
        listed = {units(word) for word in (*family.verbs, *family.nouns, *family.materials)}
        for word in (*family.keywords, *family.actions):
            if word.lower() in _TWO_PARTS and units(word) not in listed:
                lines.append(f"'{word}' of {family.key} has another meaning in English; list it in nouns, verbs or "
                             "materials as well, to count it only as such")
    evidence = [units(word) for family in taxonomy.families for word in (*family.keywords, *family.actions)]
    idle = [word for word in taxonomy.ignore if not any(_contains(units(word), phrase) for phrase in evidence)]
    if idle:
        lines.append(f"{', '.join(map(repr, idle))} of ignore contain no phrase of a family, so they do nothing")
    return lines


def _misread(labeller: CaptionLabeller) -> Iterator[str]:
    """Phrases that alone do not get their own family: split by the segmenter, hidden, or taken for something else."""
    for index, family in enumerate(labeller.taxonomy.families):
        for word in (*family.keywords, *family.actions):
            label = labeller.label(word)
            read = {i for i, weight in enumerate(label.weights) if weight} if not label.fallback else set()
            one_part = word in family.nouns or word in family.verbs
            if read == {index} or (one_part and not read and not all(map(is_han, units(word)))):
                continue
            names = ", ".join(labeller.taxonomy.families[i].key for i in sorted(read)) or "nothing"
            yield f"'{word}' of {family.key} alone is read as {names}"


def _contains(pieces: tuple[str, ...], phrase: tuple[str, ...]) -> bool:
    return any(pieces[at:at + len(phrase)] == phrase for at in range(len(pieces) - len(phrase) + 1))


def use_of(taxonomy: Taxonomy, captions: Iterable[tuple[str, str]]) -> TaxonomyUse:
    """What (location, caption) pairs match. Memory grows with the number of phrases, not of captions."""
    labeller, use = CaptionLabeller(taxonomy), TaxonomyUse()
    keys = taxonomy.keys
    for location, caption in captions:
        label = labeller.label(caption)
        use.captions += 1
        use.several += sum(weight > 0 for weight in label.weights) > 1
        if label.fallback and len(use.silent) < 10:
            use.silent.append((location, caption))
        for mention in label.mentions:
            entry = use.phrases.setdefault(
                (keys[mention.family], mention.phrase), PhraseUse(mention.phrase, keys[mention.family]))
            entry.matched += 1
            entry.counted += mention.counted
            if len(entry.examples) < _EXAMPLES and caption not in entry.examples:
                entry.examples.append(caption)
    use.phrases = dict(sorted(use.phrases.items(), key=lambda pair: (keys.index(pair[0][0]), -pair[1].matched)))
    for family in taxonomy.families:
        words = {*family.keywords, *family.actions}
        use.unused[family.key] = sum((family.key, word) not in use.phrases for word in words)
    return use
