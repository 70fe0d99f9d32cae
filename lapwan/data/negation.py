"""Negation: which mentions a text denies, such as 未使用剪刀, 剪刀未使用, without scissors, the hook is not used.

Two patterns, both inside a clause. A negator denies the mention it governs, over fillers and modifiers only
(未使用弯头剪刀, but not 无损伤抓钳 or 无出血电凝钩), the mentions joined to it (剪刀和吸引器, scissors or hook), and
what follows of the same family (未使用剪刀剪断). A mention is also denied by what follows it: a negator with a verb of
use or presence (剪刀未使用, scissors are not visible), or a withdrawal (电凝钩已撤出), unless the instrument returns.

What is yet to come is denied as well: asked or waited for, or seen from before its arrival (等待剪刀, before the hook
is introduced). What leaves during the clip is seen; what left before it (已退出, was removed before the clip starts),
or before what the sentence is about (after the scissors were removed), is not.

How to add a word: see `negation_words.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lapwan.data.caption_text import PhraseMatch, SplitText
from lapwan.data.negation_words import MATCHER, TRIGGERS
from lapwan.data.negation_words import NegationRole as Role

_LOOSE_SLACK = 2  # modifiers allowed after a loose negator: 未使用 | 锋利 | 弯头 | 剪刀
_PRIOR_WORDS = 7  # of a time before the clip: 在 | 本段 | 视频 | 开始 | 前
_LATIN_SLACK = 1  # no monopolar scissors; Chinese bare negators take none: 无 | 损伤 | 抓钳


@dataclass(frozen=True)
class _Element:
    """A word of the text and its roles; `mention` is its index, or -1 for other words."""

    role: Role
    mention: int = -1
    latin: bool = False


def negated(text: SplitText, mentions: Sequence[PhraseMatch[int]]) -> list[bool]:
    """For each mention (its `value` is the family), whether the text denies it."""
    if not mentions or TRIGGERS.isdisjoint(text.units):
        return [False] * len(mentions)
    elements = _elements(text, mentions)
    denied: set[int] = set()
    used: set[int] = set()
    for at, element in enumerate(elements):
        if element.mention >= 0 and (negator := _denied_after(elements, at)) is not None:
            denied |= _joined_before(elements, at)
            used.add(negator)
    for at, element in enumerate(elements):
        if element.role & Role.NEGATOR and at not in used and not (at and elements[at - 1].role & Role.NEGATOR):
            denied |= _Scope(elements, at, mentions).denied()
    return [index in denied for index in range(len(mentions))]


def _elements(text: SplitText, mentions: Sequence[PhraseMatch[int]]) -> list[_Element]:
    spans = {m.start: (m.end, _Element(Role.OTHER, index)) for index, m in enumerate(mentions)}
    for word in MATCHER.find(text, [(m.start, m.end) for m in mentions]):
        spans[word.start] = (word.end, _Element(word.value, latin=text.units[word.start].isascii()))
    out, at = [], 0
    while at < len(text.units):
        if at in spans:
            end, element = spans[at]
        else:
            end, element = at + 1, _Element(Role.OTHER, latin=text.units[at].isascii())
            while end < len(text.units) and not text.boundary[end] and end not in spans:
                end += 1
        out.append(element)
        at = end
    return out


def _denied_after(elements: list[_Element], at: int) -> int | None:
    """The denying word's position, if what follows mention `at` denies it: 剪刀 均 未 使用, scissors aren't visible."""
    mention, begin = at, _after_gloss(elements, at)
    listed = begin < len(elements) and bool(elements[begin].role & Role.COLON)  # scissors: none
    begin = _after_prior(elements, begin + listed)
    at = _skip(elements, begin, Role.AUXILIARY)
    if at >= len(elements):
        return None
    role = elements[at].role
    if role & Role.FINAL and _ends(elements, at + 1):
        return at
    if role & (Role.LEAVES | Role.WITHDRAWN | Role.OUT):
        return at if _is_gone(elements, mention, begin, at) and not _returns(elements, at + 1) else None
    if role & (Role.USE | Role.LAST) and _is_before_arrival(elements, mention, at):
        return at
    if role & Role.USE and any(element.role & Role.LATER for element in _clause_after(elements, at + 1)):
        return at
    if not role & (Role.NEGATOR | Role.PENDING) or (role & Role.FORWARD and not role & Role.PENDING):
        return None
    listed = listed or any(element.role & Role.ALL for element in elements[begin:at])  # 剪刀和电凝钩都没有
    if listed and _ends(elements, at + 1):
        return at
    verb = at
    complete = role & Role.LOOSE and not role & Role.FORWARD  # 剪刀未用: the verb is in the negator
    if not (complete and _ends(elements, at + 1)):
        verb = _skip(elements, at + 1, Role.AUXILIARY | Role.FILLER)
        if verb >= len(elements) or not elements[verb].role & (Role.USE | Role.LAST):
            return None
        if not elements[verb].role & Role.USE:  # not in yet
            return at if _ends(elements, _skip(elements, verb + 1, Role.FILLER)) else None
        # 吸引 未 见 出血 has an object and denies that; English has the passive here, which takes none
        if not elements[verb].latin and not _ends(elements, verb + 1):
            return None
        if verb + 1 < len(elements) and elements[verb + 1].role & Role.DETERMINER and any(
                element.mention >= 0 for element in elements[verb + 2:verb + 4]):
            return None  # the grasper pulls, never using the hook
    return at


def _is_gone(elements: list[_Element], mention: int, begin: int, at: int) -> bool:
    """Whether the departure at `at` of the mention is over: 已退出, removed before the clip starts, once it was out."""
    role = elements[at].role
    if role & Role.WITHDRAWN:
        return True
    if role & Role.OUT and not role & Role.LEAVES and not _ends(elements, at + 1):
        return False  # out to the side
    if _follows(elements, mention, Role.THEN_GONE) and elements[at].latin:
        return True
    over = Role.PERFECT | Role.PRIOR_END | (Role.OTHER if elements[at].latin else Role.ALL)
    if any(element.role & over for element in elements[max(begin - 1, 0):at]):
        return True
    if not role & Role.LEAVES:
        return False
    clause = _clause_after(elements, at + 1)
    if elements[at].latin and clause and clause[0].role & Role.STOP and not clause[0].latin:
        return True  # scissors were removed后
    return any(element.role & Role.PRIOR for element in clause) and all(element.mention < 0 for element in clause)


def _is_before_arrival(elements: list[_Element], mention: int, verb: int) -> bool:
    """剪刀 进来 之前, before the hook is introduced."""
    at = _skip(elements, verb + 1, Role.TAIL)
    if at < len(elements) and elements[at].role & Role.PRIOR_END:
        return True
    return elements[verb].latin and _follows(elements, mention, Role.UNTIL)


def _follows(elements: list[_Element], mention: int, role: Role) -> bool:
    """Whether a word of `role` governs the mention, over fillers and a modifier: before | the | curved | scissors."""
    slack = _LATIN_SLACK
    for element in reversed(elements[:mention]):
        if element.role & role:
            return True
        if element.role & (Role.BREAK | Role.COMMA) or element.mention >= 0:
            return False
        slack -= not element.role & Role.FILLER
        if slack < 0:
            return False
    return False


def _clause_after(elements: list[_Element], at: int) -> list[_Element]:
    end = at
    while end < len(elements) and not elements[end].role & (Role.COMMA | Role.BREAK):
        end += 1
    return elements[at:end]


def _after_prior(elements: list[_Element], at: int) -> int:
    """What follows a time before the clip: 抓钳 | 在 片段 开始 前 | 已 退出."""
    for end in range(at, min(at + _PRIOR_WORDS, len(elements))):
        element = elements[end]
        if element.mention >= 0 or element.role & (Role.COMMA | Role.BREAK):
            break
        if element.role & Role.PRIOR_END and any(e.role & Role.FOOTAGE for e in elements[at:end]):
            return end + 1
    return at


def _returns(elements: list[_Element], at: int) -> bool:
    """Whether what left is back, in this sentence and before another mention: 已退出，随后重新进入."""
    for element in elements[at:]:
        if element.mention >= 0 or (element.role & Role.BREAK and not element.role & Role.COLON):
            return False
        if element.role & Role.RETURN:
            return True
    return False


def _after_gloss(elements: list[_Element], at: int) -> int:
    """What follows mention `at` and its gloss: 剪刀 (scissors) 已撤出."""
    if [bool(e.role & Role.BREAK) for e in elements[at + 1:at + 4]] == [True, False, True] and (
            elements[at + 2].mention >= 0):
        return at + 4
    inside = at >= 2 and elements[at - 1].role & Role.BREAK and elements[at - 2].mention >= 0
    return at + 2 if inside and elements[at + 1:at + 2] and elements[at + 1].role & Role.BREAK else at + 1


def _ends(elements: list[_Element], at: int) -> bool:
    at = _skip(elements, at, Role.TAIL)
    return at >= len(elements) or bool(elements[at].role & (Role.COMMA | Role.BREAK))


def _skip(elements: list[_Element], at: int, role: Role) -> int:
    while at < len(elements) and elements[at].role & role:
        at += 1
    return at


def _joined_before(elements: list[_Element], at: int) -> set[int]:
    """The mention at `at` and those joined before it: 剪刀 和 电凝钩."""
    mentions = {elements[at].mention}
    join = Role.OTHER
    listing = Role.JOIN
    if any(element.role & (Role.COLON | Role.ALL) for element in elements[at + 1:at + 3]):
        listing |= Role.COMMA
    for number in range(at - 1, -1, -1):
        element = elements[number]
        if element.mention >= 0 and (join or (listing & Role.COMMA and elements[number + 1].mention >= 0)):
            # a comma may also end another clause: 仅见吸引器，剪刀和电凝钩都不在画面
            if join & Role.COMMA and number and not elements[number - 1].role & (listing | Role.BREAK):
                break
            mentions.add(element.mention)
            join = Role.OTHER
        elif element.role & listing:
            join = element.role & listing
        elif not element.role & Role.FILLER:
            break
    return mentions


class _Scope:
    """The scope of the negator at `at`: the mentions it governs, read to the right until something ends it."""

    def __init__(self, elements: list[_Element], at: int, mentions: Sequence[PhraseMatch[int]]) -> None:
        self._elements, self._at, self._mentions = elements, at, mentions
        self._family: int | None = None  # of the last denied mention
        self._joined = False  # a conjunction since
        self._drifted = False  # other words since
        self._lost = False  # too many words before the first mention
        self._loosen(elements[at])

    def _loosen(self, element: _Element) -> None:
        self._slack = _LOOSE_SLACK if element.role & Role.LOOSE else _LATIN_SLACK if element.latin else 0
        self._stepped = False

    def denied(self) -> set[int]:
        denied: set[int] = set()
        for at in range(self._at + 1, len(self._elements)):
            element = self._elements[at]
            if element.mention >= 0:
                if not self._governs(element.mention):
                    break
                denied.add(element.mention)
            elif self._ended(element, at):
                break
        return denied

    def _governs(self, mention: int) -> bool:
        family = self._mentions[mention].value
        if (self._lost and self._family is None) or (self._family not in (None, family) and not self._joined):
            return False
        self._family, self._joined, self._drifted = family, False, False
        return True

    def _ended(self, element: _Element, at: int) -> bool:
        """Read a word that is not a mention; True if it ends the negator's scope."""
        role = element.role
        if role & Role.NEGATOR and not role & Role.JOIN:
            return True  # a second negator starts its own scope, or lifts this one (not without scissors)
        agenda = self._elements[self._at].role & Role.LATER and at == self._at + 1
        if role & Role.COLON and agenda:
            return False  # next step: scissors
        if role & (Role.BREAK | Role.WITHDRAWN):
            return True
        if role & Role.COMMA:
            self._joined = self._family is not None and not self._drifted and self._list_goes_on(at + 1)
            return not self._joined
        return self._after_mention(role) if self._family is not None else self._before_mention(element)

    def _after_mention(self, role: Role) -> bool:
        if role & Role.JOIN:
            self._joined = not self._drifted
        elif role & (Role.STOP | Role.SOFT_STOP):
            return True
        elif not role & (Role.FILLER | Role.AUXILIARY):
            self._drifted, self._joined = True, False
        return False

    def _before_mention(self, element: _Element) -> bool:
        role = element.role
        if role & Role.JOIN:
            self._lost &= not role & Role.OR
            self._stepped &= not role & Role.OR  # no bleeding and | the hook
        elif role & (Role.USE | Role.HELD) and not self._lost:
            self._loosen(element)
        elif role & Role.STOP:
            return True
        elif role & Role.DETERMINER and self._stepped:
            self._lost = True  # without bleeding | the hook
        elif not role & (Role.FILLER | Role.AUXILIARY):
            self._slack -= 1
            self._stepped = True
            self._lost |= self._slack < 0
        return False

    def _list_goes_on(self, at: int) -> bool:
        """Whether a comma is inside `A, B or C`: more mentions, and an `or` before the last."""
        alternatives = False
        while at < len(self._elements):
            element = self._elements[at]
            if element.role & Role.JOIN:
                alternatives |= bool(element.role & Role.OR)
            elif element.mention >= 0:
                if alternatives:
                    return True
            elif not element.role & (Role.FILLER | Role.COMMA):
                return False
            at += 1
        return False
