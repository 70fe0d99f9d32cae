"""What a mention does in its clause: an instrument at work, what another instrument does, an object, a result.

A taxonomy lists which of its words are `verbs`, `nouns` and `materials`. The rules, for mentions that nothing denies:

- a verb that another instrument, or the camera, does counts for that one only (双极钳夹住);
- a material that another instrument works on or beside is no instrument (在钛夹之间剪断, scissors cut the suture);
- a material counts only where it is being applied (clips are placed, but not clips in place);
- a participle before its noun is a result (the clipped duct, 夹闭的胆囊管);
- a step that is over (已夹闭, has been clipped) counts only if nothing else does.

A tagger would not do here: jieba without its HMM has one tag a word, and English taggers need a model to download. The
words on both sides of an ambiguous word decide in the short sentences of captions.

How to add a word: put it into its row below.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from lapwan.data.caption_text import PhraseMatcher, SplitText, is_han, units

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


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _phrases(text: str) -> list[tuple[str, ...]]:
    return [units(word.replace("_", " ")) for word in text.split()]


# Adjectives that may stand inside a keyword of several words: bipolar Maryland forceps, 双极弯钳
MODIFIERS = _phrases("""
    curved straight angled long short fine blunt sharp atraumatic traumatic fenestrated toothed laparoscopic endoscopic
    robotic articulating articulated disposable reusable maryland cadiere micro mini small large tip tipped 3 5 8 10 12
    mm 3mm 5mm 8mm 10mm 12mm
    弯 直 长 短 细 弯头 直头 尖头 钝头 圆头 弧形 无创 无损伤 有齿 无齿 有孔 开窗 窗式 腹腔镜 腔镜 机器人 一次性 精细
    加长 马里兰 式 型
""")
_SENTENCE_END = frozenset("。.;!?…")
_CLAUSE_START = PhraseMatcher((word, True) for word in _phrases("""
    , : 、 ( ) — 后 之后 以后 并 并且 再 然后 随后 接着 继而 同时 而 但 但是 用 以 使用 采用 借助 由 和 与 及 以及 改用
    and then while whereas as after before when until but so followed_by or
"""))
_DETERMINERS = _words("the a an this that these those its his her their our my your each every both any some another")
_NUMBERS = _words("one two three four five several many multiple few all")
_PREPOSITIONS = _words("""
    of in on at from into onto between behind below above under over near around along through across against toward
    towards beside beyond within for with by using per via to off
""")
_FUNCTION_WORDS = _DETERMINERS | _PREPOSITIONS | _words("""
    and or nor but then while as when until so is are was were be been being has have had do does did not away up out
    down back it them him further again completely together until
""")
_AUXILIARIES = _words("is are was were be been being am get gets")
_PERFECT = _words("has have had")
_EARLIER = _words("already previously just recently formerly earlier")
_PRONOUNS = _words("i we he she they you it who which")
_BEFORE_VERB = _words("to will would can could may might must should shall does do did not")
_PARTICIPLES = _words("cut held torn burnt split")
_CHINESE_EARLIER = _phrases("已 已经 已被 均已 刚 刚刚 曾 业已")
_CHINESE_NOUN_ENDS = frozenset("钳镊刀剪钩器夹针线袋管头棒布条极套仪子锯铲圈卡网")
_RESULT = re.compile(r"(后|过|好|完|了)?(的|处(?![理置于在])|端|线|面|痕)|之前|以前|前(?![方壁端侧缘])")
_STILL_AT_WORK = re.compile(r"的?(方式|方法|同时|过程|时候|情况|器械|作用|效果|操作)")
_CHINESE_NEAR = re.compile(r"(之间|间|旁|处|远端|近端|远侧|近侧|上方|下方|外侧|内侧|附近)")
_NEAR = _words("between near beside above below beyond distal proximal behind around along")
_SUBJECTS = PhraseMatcher((word, True) for word in _phrases("""
    助手 术者 主刀 左手 右手 医生 护士 另一 assistant surgeon operator
"""))
# What makes a material an instrument at work; verbs that are keywords themselves need no entry
_APPLIED = PhraseMatcher((word, True) for word in _phrases("""
    上 放置 置入 置 放 施 施加 施放 释放 打 打上 打入 套 套上 锁 锁闭 锁扣 扣 夹 夹闭 夹住 钳夹 双重 应用 使用 用 以
    置放 安放 击发 缝 缝合 结扎 捆扎 收紧 拉紧 打结 穿过 穿 刺入 刺 插入 置于 推结 缠绕 压迫 填塞 擦拭 拭净 蘸 擦
    go_on goes_on place apply applied fire deploy close occlude secure load put lock squeeze clamp clamped insert
    position use using tie tied tying pass drive tighten throw threw run sew stitch ligate seal pull loop press pack dab wipe soak
    introduce enter advance approach
"""))
_TO_COME = PhraseMatcher((word, True) for word in _phrases("""
    准备 拟 即将 将要 打算 计划 预备 等待 等候 待 下一步 尚未 还没 还未 未开始
    about_to prepare_to preparing_to ready_to ready_for prepare_for preparing_for going_to next_step next_up up_next planned plan_to wait_for await scheduled not_yet yet_to
    not_started not_begun
"""))
_LOOKALIKE = frozenset({*"样状形", *map("".join, _phrases("like shaped"))})
_VIEWERS = PhraseMatcher((word, True) for word in _phrases("镜头 摄像头 camera lens"))
_UNDER_VIEW = frozenset("下中内里")
_JAWS = frozenset({"钳", "镊", "极", *map("".join, _phrases("forceps grasper tweezers bipolar clamp holder driver"))})
_CURRENT = frozenset({"极", *map("".join, _phrases("bipolar monopolar"))})
_NEEDS_CURRENT = frozenset({
    *"电凝灼", *map("".join, _phrases("cauterize cauterise electrocoagulate electrocauterize coagulate"))
})
_NOT_BEGUN = re.compile(r"(操作|步骤)?(即将|正式)?(开始)?(之前|以前|前(?![方壁端侧缘]))|尚未|还未|还没|未开始")
_BEFORE = re.compile(r"\b(before|prior to|until|ahead of)( [a-z]+){0,5} $")
_NEXT = re.compile(r"(next|next step|up next|plan|planned|下 一 步|计 划) : $")
_AFTER = re.compile(r"\b(after|following|once)( the| a| an)? $")
_OVER = re.compile(r"(之)?后|以后|完成|完毕|结束")
_STILL_HELD = frozenset("住起持紧牢")
_CLEANING = frozenset({*"洗清擦拭", *map("".join, _phrases("clean wash rinse wipe irrigate flush"))})
_LENSES = PhraseMatcher((word, True) for word in _phrases("""
    镜头 镜子 镜面 镜片 物镜 摄像头 lens camera scope laparoscope optic
"""))
# What happens to a lens that is then cleaned; one that zooms in or moves is not
_DIRTY = frozenset({*"雾糊脏污沾染退拔取出拿", *map("".join, _phrases(
    "fog foggy fogging smear dirty blurred blurry stain out outside remove withdraw exit"))})
_FLUIDS = frozenset({*"血液烟水汁脓渗雾", *map("".join, _phrases(
    "blood fluid smoke bile pus clot saline field view fluids debris plume pelvis abdomen"))})
_APPLIERS = frozenset({"夹", *map("".join, _phrases("applier clipper applicator"))})
_CLIPPED = re.compile(r"胆囊|动脉|静脉|血管|残端|近端|远端|断端|管|蒂|系膜")
_CLIPPED_WORDS = frozenset(map("".join, _phrases("cystic artery duct vessel stump vein pedicle proximal distal")))
_COMPLEMENTS = frozenset("了着过开断成住掉")


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
        part = "noun" if "verb" not in parts and after not in _COMPLEMENTS else "verb"
    else:
        part = "verb" if _is_english_verb(text, start, end) else "noun"
    return part if part in parts else None


def _is_english_verb(text: SplitText, start: int, end: int) -> bool:
    word, before, after = _word(text, end - 1), _word(text, start - 1), _word(text, end)
    if word.endswith(("ing", "ed")):
        return True
    if before in _BEFORE_VERB | _PRONOUNS:
        return True
    if before in _DETERMINERS | _NUMBERS | _PREPOSITIONS | _AUXILIARIES:
        return False
    if after in _DETERMINERS or after in _PRONOUNS:
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
        self._starts = sorted({0, *(word.start for word in _CLAUSE_START.find(text, spans)),
                               *(at + 1 for at, unit in enumerate(text.units) if unit in _SENTENCE_END)})
        self._sentences = [at + 1 for at, unit in enumerate(text.units) if unit in _SENTENCE_END]
        self._subjects = [word.start for word in _SUBJECTS.find(text, spans)]
        self._viewers = [word.start for word in _VIEWERS.find(text, spans)
                         if self._after(word.end)[:1] not in _UNDER_VIEW]
        self._lenses = [word.start for word in _LENSES.find(text, spans)
                        if self._after(word.end)[:1] not in _UNDER_VIEW]
        self._applied = [word.start for word in _APPLIED.find(text, spans)]
        self._to_come = [word.start for word in _TO_COME.find(text, spans)]
        self._results = [self._is_result(m) for m in mentions]
        # 剪断后，剪刀已撤出: what a denied instrument did is over too
        present = {m.family for m in mentions
                   if not m.negated and m.part in ("", "noun") and not self._is_chinese_verb(m)}
        self._gone = {m.family for m in mentions if m.negated} - present
        self._applier_gone = any(m.negated and m.part != "material"
                                 and not _APPLIERS.isdisjoint(text.units[m.start:m.end]) for m in mentions)
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
        if _NEXT.search(self._words_before(mention)):
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
                or any(m.family == material.family and self._clause(m) == clause
                       and self._at_work(m, ("", "noun", "verb")) for m in self._mentions)
                or _word(self._text, material.end) in _DETERMINERS or self._is_transitive(material))

    def _is_transitive(self, material: RoleMention) -> bool:
        """A material as a verb before what it is applied to: double clip胆囊管, clips cystic artery."""
        if is_han(self._text.units[material.end - 1]) or material.end >= len(self._text.units):
            return False
        return (self._text.units[material.end] in _CLIPPED_WORDS
                or _CLIPPED.match(self._after(material.end)) is not None)

    def _cleans_the_lens(self, mention: RoleMention) -> bool:
        """Whether the lens is cleaned, in its clause or, without an instrument, as the subject of the sentence."""
        if _CLEANING.isdisjoint(self._text.units[mention.start:mention.end]) or self._text.units[mention.end - 1] in (
                _CHINESE_NOUN_ENDS):
            return False
        clause, sentence = self._clause(mention), bisect_right(self._sentences, mention.start)
        agents = [m for m in self._mentions if m.part != "verb" and m.family >= 0 and self._at_work(m, ("", "noun"))
                  and _CLEANING.isdisjoint(self._text.units[m.start:m.end])]
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
        return not _DIRTY.isdisjoint(between)

    def _has_fluid_object(self, verb: RoleMention) -> bool:
        return not _FLUIDS.isdisjoint(self._text.units[verb.end:verb.end + 8])

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
        if self._has_fluid_object(verb) and not _CLEANING.isdisjoint(self._text.units[verb.start:verb.end]):
            return False
        sentence = bisect_right(self._sentences, verb.start)
        earlier = [m for m in agents if m.start < verb.start and bisect_right(self._sentences, m.start) == sentence]
        if earlier and earlier[-1].family == NO_FAMILY:  # 超声刀凝闭后离断
            return True
        able = _CURRENT if _NEEDS_CURRENT.intersection(self._text.units[verb.start:verb.end]) else _JAWS
        return bool(earlier) and all(m.family != verb.family for m in earlier) and any(
            not able.isdisjoint(self._text.units[m.start:m.end]) for m in earlier)

    def _handled(self, material: RoleMention) -> bool:
        """Whether an instrument of another family works on the material, or something happens beside it."""
        clause = self._clause(material)
        if any(m.family != material.family and self._clause(m) == clause and self._at_work(m, ("", "noun", "verb"))
               for m in self._mentions):
            return True
        if is_han(self._text.units[material.start]):
            return _CHINESE_NEAR.match(self._after(material.end)) is not None
        return not _NEAR.isdisjoint(self._text.words[max(material.start - 3, 0):material.start])

    def _after(self, at: int) -> str:
        return "".join(self._text.units[at:at + 4])

    def _is_result(self, mention: RoleMention) -> bool:
        if self._text.units[mention.end:mention.end + 1] and self._text.units[mention.end] in _LOOKALIKE:
            return True
        if is_han(self._text.units[mention.end - 1]):
            after = self._after(mention.end)
            return (self._is_chinese_verb(mention) and _RESULT.match(after) is not None
                    and _STILL_AT_WORK.match(after) is None)
        return self._is_to_come(mention) or self._is_attributive(mention)

    def _is_to_come(self, mention: RoleMention) -> bool:
        """Before any dissection, prior to clipping the duct, dissection开始前."""
        if not _word(self._text, mention.end - 1).endswith(("ing", "ion")):
            return False
        return (_BEFORE.search(self._words_before(mention)) is not None
                or _NOT_BEGUN.match("".join(self._text.units[mention.end:mention.end + 8])) is not None)

    def _words_before(self, mention: RoleMention) -> str:
        return " ".join(self._text.words[max(mention.start - 8, 0):mention.start]) + " "

    def _is_attributive(self, mention: RoleMention) -> bool:
        """A past participle before its noun: the clipped duct, previously ligated vessels."""
        word, at = _word(self._text, mention.end - 1), mention.end
        if not (word.endswith("ed") or word in _PARTICIPLES):
            return False
        if _word(self._text, at) in ("and", "or", ",") and _word(self._text, at + 1).endswith("ed"):
            at += 2  # clipped and divided
        after = _word(self._text, at)
        if not after.isalpha() or is_han(after[0]) or after in _FUNCTION_WORDS or after.endswith("ly"):
            return False
        if not mention.start or not _word(self._text, mention.start - 1).isalnum():
            return True
        before = _word(self._text, mention.start - 1)
        return before in _DETERMINERS | _PREPOSITIONS | _NUMBERS | _EARLIER or before.endswith("ly")

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
        return is_han(last) and last not in _CHINESE_NOUN_ENDS

    def _is_over(self, mention: RoleMention) -> bool:
        """A step that is over: 已夹闭, has been clipped, previously ligated."""
        start = mention.start
        deed = mention.part == "verb" or _word(self._text, mention.end - 1).endswith(("ing", "ion"))
        if deed and _OVER.match(self._after(mention.end)) is not None and (
                self._text.units[mention.end - 1] not in _STILL_HELD):
            return True  # 夹闭后，剪刀剪断
        if is_han(self._text.units[start]):
            return (self._is_chinese_verb(mention)
                    and any(self._text.units[max(start - len(w), 0):start] == w for w in _CHINESE_EARLIER))
        before, second = _word(self._text, start - 1), _word(self._text, start - 2)
        if self._mentions[-1].start > start and _word(self._text, mention.end - 1).endswith(("ing", "ion")) and (
                _AFTER.search(self._words_before(mention)) is not None):
            return True  # after clipping, scissors cut
        if not (_word(self._text, mention.end - 1).endswith("ed")
                or _word(self._text, mention.end - 1) in _PARTICIPLES):
            return False
        return before in _EARLIER or (before == "been" and second in _PERFECT | _EARLIER)
