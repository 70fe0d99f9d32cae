"""What a mention does in its clause: an instrument at work, what another instrument does, an object, a result.

A taxonomy lists which of its words are `verbs`, `nouns` and `materials`. The rules, for mentions that nothing denies:

- a verb that another instrument, or the camera, does counts for that one only (双极钳夹住);
- a material that another instrument works on or beside is no instrument (在钛夹之间剪断, scissors cut the suture);
- a material counts only where it is being applied (clips are placed, but not clips in place);
- a participle before its noun is a result (the clipped duct, 夹闭的胆囊管);
- a step that is over (已夹闭, has been clipped, after clipping) counts only if nothing else does, and not at all if its
  instrument is denied; one that is to come (接下来准备夹闭, before any dissection) does not count;
- cleaning the lens is nobody's work in the field.

A tagger would not do here: jieba without its HMM has one tag a word, and English taggers need a model to download. The
words on both sides of an ambiguous word decide in the short sentences of captions.

How to add a word: see `mention_words.py`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from lapwan.data.caption_text import SplitText, is_han
from lapwan.data.mention_words import (
    AFTER,
    APPLIED,
    APPLIERS,
    AUXILIARIES,
    BEFORE,
    BEFORE_VERB,
    CHINESE_EARLIER,
    CHINESE_NEAR,
    CHINESE_NOUN_ENDS,
    CLAUSE_START,
    CLEANING,
    CLIPPED,
    CLIPPED_WORDS,
    COMPLEMENTS,
    CURRENT,
    DETERMINERS,
    DIRTY,
    EARLIER,
    FLUIDS,
    FUNCTION_WORDS,
    HOLD,
    JAWS,
    LENSES,
    LOOKALIKE,
    NEAR,
    NEEDS_CURRENT,
    NEXT,
    NOT_BEGUN,
    NUMBERS,
    OVER,
    PARTICIPLES,
    PERFECT,
    PREPOSITIONS,
    PRONOUNS,
    RESULT,
    SENTENCE_END,
    STILL_AT_WORK,
    STILL_HELD,
    SUBJECTS,
    TO_COME,
    UNDER_VIEW,
    VIEWERS,
)

NO_FAMILY = -2  # the family of an instrument that belongs to none


class Weight(IntEnum):
    """How a mention counts as evidence."""

    NOTHING = 0
    LAST_RESORT = 1  # only if no other mention counts
    FULL = 2


@dataclass(frozen=True)
class RoleMention:
    """A match to judge: units[start:end] of family `family`; `part` is verb, noun, material, or empty (any of them)."""

    start: int
    end: int
    family: int
    part: str = ""
    negated: bool = False


def weigh(text: SplitText, mentions: Sequence[RoleMention]) -> list[Weight]:
    """How much each mention of a text counts, by the rules of this module; denied ones count nothing."""
    return _Roles(text, mentions).weights() if mentions else []


def part_in(text: SplitText, start: int, end: int, parts: Sequence[str]) -> str | None:
    """What the word at units[start:end] is in its sentence, of the `parts` that the taxonomy lists for it.

    Returns:
        verb, noun, material, or empty if the taxonomy does not say; None if the sentence uses it as another part.
    """
    if not parts or parts == ("material",):
        return "".join(parts)
    if is_han(text.units[start]):
        after = text.units[end] if end < len(text.units) else ""
        part = "noun" if "verb" not in parts and after not in COMPLEMENTS else "verb"
    else:
        part = "verb" if _is_english_verb(text, start, end) else "noun"
    return part if part in parts else None


def _is_english_verb(text: SplitText, start: int, end: int) -> bool:
    word, before, after = _word(text, end - 1), _word(text, start - 1), _word(text, end)
    if word.endswith(("ing", "ed")):
        return True
    if before in BEFORE_VERB | PRONOUNS:
        return True
    if before in DETERMINERS | NUMBERS | PREPOSITIONS | AUXILIARIES:
        return False
    if after in DETERMINERS or after in PRONOUNS:
        return True
    if word.endswith("s") and word != text.units[end - 1]:
        return bool(before)
    return before.endswith("s")


def _word(text: SplitText, at: int) -> str:
    return text.words[at] if 0 <= at < len(text.words) else ""


class _Roles:
    def __init__(self, text: SplitText, mentions: Sequence[RoleMention]) -> None:
        self._text, self._mentions = text, mentions
        spans = [(m.start, m.end) for m in mentions]
        self._starts = sorted({0, *(word.start for word in CLAUSE_START.find(text, spans)),
                               *(at + 1 for at, unit in enumerate(text.units) if unit in SENTENCE_END)})
        self._sentences = [at + 1 for at, unit in enumerate(text.units) if unit in SENTENCE_END]
        self._subjects = [word.start for word in SUBJECTS.find(text, spans)]
        self._viewers = [word.start for word in VIEWERS.find(text, spans)
                         if self._after(word.end)[:1] not in UNDER_VIEW]
        self._lenses = [word.start for word in LENSES.find(text, spans)
                        if self._after(word.end)[:1] not in UNDER_VIEW]
        self._applied = [word.start for word in APPLIED.find(text, spans)]
        self._to_come = [word.start for word in TO_COME.find(text, spans)]
        self._results = [self._is_result(m) for m in mentions]
        # 剪断后，剪刀已撤出: what a denied instrument did is over too
        present = {m.family for m in mentions
                   if not m.negated and m.part in ("", "noun") and not self._is_chinese_verb(m)}
        self._gone = {m.family for m in mentions if m.negated} - present
        self._applier_gone = any(m.negated and m.part != "material"
                                 and not APPLIERS.isdisjoint(text.units[m.start:m.end]) for m in mentions)
        for m, result in zip(mentions, list(self._results), strict=True):
            if result:
                self._reach_back(m)

    def weights(self) -> list[Weight]:
        return [self._weight(at) for at in range(len(self._mentions))]

    def _weight(self, at: int) -> Weight:
        mention = self._mentions[at]
        if mention.negated or self._results[at]:
            return Weight.NOTHING
        if mention.part == "verb" and self._done_by_another(mention):
            return Weight.NOTHING
        if mention.part != "noun" and self._cleans_the_lens(mention):
            return Weight.NOTHING
        if self._is_chinese_verb(mention) and mention.family in self._gone:
            return Weight.NOTHING
        if mention.part == "material" and (
                self._applier_gone or self._handled(mention) or not self._is_applied(mention)):
            return Weight.NOTHING
        if mention.part in ("verb", "material") and self._in_clause(self._to_come, mention, before=True):
            return Weight.NOTHING
        if NEXT.search(self._words_before(mention)):
            return Weight.NOTHING
        if self._is_hold_of_material(mention):
            return Weight.NOTHING
        return Weight.LAST_RESORT if self._is_over(mention) else Weight.FULL

    def _clause(self, mention: RoleMention) -> int:
        return bisect_right(self._starts, mention.start)

    def _in_clause(self, starts: Sequence[int], mention: RoleMention, before: bool = False) -> bool:
        clause = self._clause(mention)
        return any(bisect_right(self._starts, at) == clause and (at < mention.start or not before) for at in starts)

    def _is_applied(self, material: RoleMention) -> bool:
        """Whether its clause puts the material to use; a word of the material itself may do so (clipping, sutured)."""
        clause = self._clause(material)
        word = _word(self._text, material.end - 1)
        rest = (*self._text.units[:material.start], *self._text.units[material.end:])
        if not any(unit.isalnum() for unit in rest):
            return True  # the material alone, such as a user's hint
        return (word.endswith(("ing", "ed")) or self._in_clause(self._applied, material)
                or any(m.family == material.family and self._clause(m) == clause and not self._is_hold_of_material(m)
                       and self._at_work(m, ("", "noun", "verb")) for m in self._mentions)
                or _word(self._text, material.end) in DETERMINERS or self._is_transitive(material))

    def _is_hold_of_material(self, verb: RoleMention) -> bool:
        """Both clips hold well."""
        return self._text.units[verb.start:verb.end] in HOLD and any(
            m.part == "material" and m.end == verb.start for m in self._mentions)

    def _is_transitive(self, material: RoleMention) -> bool:
        """A material as a verb before what it is applied to: double clip胆囊管, clips cystic artery."""
        if is_han(self._text.units[material.end - 1]) or material.end >= len(self._text.units):
            return False
        return (self._text.units[material.end] in CLIPPED_WORDS
                or CLIPPED.match(self._after(material.end)) is not None)

    def _cleans_the_lens(self, mention: RoleMention) -> bool:
        """Whether the lens is cleaned, in its clause or, without an instrument, as the subject of the sentence."""
        if CLEANING.isdisjoint(self._text.units[mention.start:mention.end]) or self._text.units[mention.end - 1] in (
                CHINESE_NOUN_ENDS):
            return False
        clause, sentence = self._clause(mention), bisect_right(self._sentences, mention.start)
        agents = [m for m in self._mentions if m.part != "verb" and m.family >= 0 and self._at_work(m, ("", "noun"))
                  and CLEANING.isdisjoint(self._text.units[m.start:m.end])]
        if any(self._clause(m) == clause for m in agents):
            return False
        lenses = [at for at in self._lenses if bisect_right(self._sentences, at) == sentence]
        if any(bisect_right(self._starts, at) == clause for at in lenses):
            return True
        before = [at for at in lenses if at < mention.start]
        return bool(before) and not any(before[-1] < m.start < mention.start for m in agents) and (
            not self._has_fluid_object(mention) and self._leaves_for_cleaning(before[-1], mention.start))

    def _leaves_for_cleaning(self, lens: int, verb: int) -> bool:
        between = self._text.units[lens:verb]
        return not DIRTY.isdisjoint(between)

    def _has_fluid_object(self, verb: RoleMention) -> bool:
        return not FLUIDS.isdisjoint(self._text.units[verb.end:verb.end + 8])

    def _at_work(self, mention: RoleMention, parts: tuple[str, ...]) -> bool:
        at = self._mentions.index(mention)
        return mention.part in parts and not mention.negated and not self._results[at]

    def _done_by_another(self, verb: RoleMention) -> bool:
        """Whether another family's instrument is in the verb's clause, or an able one was the last subject."""
        clause = self._clause(verb)
        agents = [m for m in self._mentions if self._at_work(m, ("", "noun"))]
        here = [m for m in agents if self._clause(m) == clause]
        if here:
            return all(m.family != verb.family for m in here)
        if self._in_clause(self._viewers, verb, before=True):
            return True  # the camera pulls back
        if self._in_clause(self._subjects, verb, before=True):
            return False
        if self._has_fluid_object(verb) and not CLEANING.isdisjoint(self._text.units[verb.start:verb.end]):
            return False
        sentence = bisect_right(self._sentences, verb.start)
        earlier = [m for m in agents if m.start < verb.start and bisect_right(self._sentences, m.start) == sentence]
        if earlier and earlier[-1].family == NO_FAMILY:  # 超声刀凝闭后离断
            return True
        able = CURRENT if NEEDS_CURRENT.intersection(self._text.units[verb.start:verb.end]) else JAWS
        return bool(earlier) and all(m.family != verb.family for m in earlier) and any(
            not able.isdisjoint(self._text.units[m.start:m.end]) for m in earlier)

    def _handled(self, material: RoleMention) -> bool:
        """Whether an instrument of another family works on the material, or something happens beside it."""
        clause = self._clause(material)
        if any(m.family != material.family and self._clause(m) == clause and self._at_work(m, ("", "noun", "verb"))
               for m in self._mentions):
            return True
        if is_han(self._text.units[material.start]):
            return CHINESE_NEAR.match(self._after(material.end)) is not None
        return not NEAR.isdisjoint(self._text.words[max(material.start - 3, 0):material.start])

    def _after(self, at: int) -> str:
        return "".join(self._text.units[at:at + 4])

    def _is_result(self, mention: RoleMention) -> bool:
        if self._text.units[mention.end:mention.end + 1] and self._text.units[mention.end] in LOOKALIKE:
            return True
        if is_han(self._text.units[mention.end - 1]):
            after = self._after(mention.end)
            return (self._is_chinese_verb(mention) and RESULT.match(after) is not None
                    and STILL_AT_WORK.match(after) is None)
        return self._is_to_come(mention) or self._is_attributive(mention)

    def _is_to_come(self, mention: RoleMention) -> bool:
        """Before any dissection, prior to clipping the duct, dissection开始前."""
        if not _word(self._text, mention.end - 1).endswith(("ing", "ion")):
            return False
        return (BEFORE.search(self._words_before(mention)) is not None
                or NOT_BEGUN.match("".join(self._text.units[mention.end:mention.end + 8])) is not None)

    def _words_before(self, mention: RoleMention) -> str:
        return " ".join(self._text.words[max(mention.start - 8, 0):mention.start]) + " "

    def _is_attributive(self, mention: RoleMention) -> bool:
        """A past participle before its noun: the clipped duct, previously ligated vessels."""
        word, at = _word(self._text, mention.end - 1), mention.end
        if not (word.endswith("ed") or word in PARTICIPLES):
            return False
        if _word(self._text, at) in ("and", "or", ",") and _word(self._text, at + 1).endswith("ed"):
            at += 2  # clipped and divided
        after = _word(self._text, at)
        if not after.isalpha() or is_han(after[0]) or after in FUNCTION_WORDS or after.endswith("ly"):
            return False
        if not mention.start or not _word(self._text, mention.start - 1).isalnum():
            return True
        before = _word(self._text, mention.start - 1)
        return before in DETERMINERS | PREPOSITIONS | NUMBERS | EARLIER or before.endswith("ly")

    def _reach_back(self, result: RoleMention) -> None:
        """已用钛夹夹闭的胆囊管: what lies between 已 and the result belongs to it."""
        begin = max(result.start - 8, 0)
        for at in range(result.start - 1, begin - 1, -1):
            if not self._text.units[at].isalnum():
                return
            if self._text.units[at] == "已":
                for number, mention in enumerate(self._mentions):
                    self._results[number] |= at < mention.start < result.start
                return

    def _is_chinese_verb(self, mention: RoleMention) -> bool:
        last = self._text.units[mention.end - 1]
        return is_han(last) and last not in CHINESE_NOUN_ENDS

    def _is_over(self, mention: RoleMention) -> bool:
        """A step that is over: 已夹闭, has been clipped, previously ligated."""
        start = mention.start
        deed = mention.part == "verb" or _word(self._text, mention.end - 1).endswith(("ing", "ion"))
        if deed and OVER.match(self._after(mention.end)) is not None and (
                self._text.units[mention.end - 1] not in STILL_HELD):
            return True  # 夹闭后，剪刀剪断
        if is_han(self._text.units[start]):
            return (self._is_chinese_verb(mention)
                    and any(self._text.units[max(start - len(w), 0):start] == w for w in CHINESE_EARLIER))
        before, second = _word(self._text, start - 1), _word(self._text, start - 2)
        if self._mentions[-1].start > start and _word(self._text, mention.end - 1).endswith(("ing", "ion")) and (
                AFTER.search(self._words_before(mention)) is not None):
            return True  # after clipping, scissors cut
        if not (_word(self._text, mention.end - 1).endswith("ed")
                or _word(self._text, mention.end - 1) in PARTICIPLES):
            return False
        return before in EARLIER or (before == "been" and second in PERFECT | EARLIER)
