"""Captions in one spelling: full-width, case, traditional characters, English inflections.

How to add a character: append the pair to `_TRADITIONAL`; only characters that occur in instrument vocabulary, in
negations, or beside them matter here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

# Traditional character followed by its simplified form.
_TRADITIONAL = (
    "鉗钳電电鉤钩鈎钩極极雙双單单斷断開开夾夹鑷镊標标無无沒没術术離离組组織织膽胆沖冲縫缝針针線线燒烧狀状氣气結结紮扎"
    "貼贴鈦钛創创鏡镜動动脈脉視视鬆松體体牽牵張张閉闭壓压擠挤撐撑撥拨繼继續续對对時时從从將将兩两進进連连過过還还這这"
    "會会為为並并與与後后裡里裏里頭头腸肠臟脏網网腫肿層层邊边細细紅红純纯經经給给絲丝統统繞绕貫贯轉转輕轻輔辅輸输選选"
    "遠远鈍钝銳锐長长門门間间關关隨随際际難难靜静顯显飛飞餘余須须顆颗項项僅仅卻却啟启啓启採采應应別别見见現现發发畫画"
    "處处內内蓋盖塊块屍尸傷伤側侧備备點点淨净滲渗溼湿濕湿灘滩滌涤導导帶带幹干彎弯異异當当攪搅擺摆擴扩敗败損损換换搖摇"
    "據据擋挡擇择撿捡槍枪樣样橫横檢检機机殘残殼壳準准溫温滅灭漿浆潔洁濾滤煙烟熱热爾尔牀床犧牺獨独盡尽盤盘確确積积穩稳"
    "節节筆笔簡简紗纱級级約约緊紧緣缘緩缓縮缩總总繩绳聽听脫脱腦脑膠胶膚肤臨临舉举蘭兰虛虚蟲虫補补製制複复覺觉觀观觸触"
    "訂订記记設设許许診诊該该話话說说請请調调護护讓让負负貨货質质跡迹躍跃載载較较遞递適适釋释鈣钙銜衔鋒锋錯错鏈链鐵铁"
    "閃闪闊阔陰阴陽阳雜杂霧雾韌韧順顺預预頸颈頂顶額额顎颚類类驅驱勢势勻匀區区協协參参吳吴員员喚唤嘗尝圍围圓圆場场墊垫"
    "壞坏夠够奪夺寬宽實实寫写屬属岡冈"
)
_TABLE: dict[int, str | None] = {
    ord(_TRADITIONAL[i]): _TRADITIONAL[i + 1] for i in range(0, len(_TRADITIONAL), 2)
}
_TABLE |= {ord(c): "'" for c in "’‘ʼ`"}
_TABLE |= {ord(c): " " for c in "-‐‑‒–_"}
_TABLE |= {ord(c): None for c in "\u200b\u200c\u200d\ufeff\u00ad"}

IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
PIECE = re.compile(rf"(?P<han>[{IDEOGRAPHS}]+)|(?P<word>[^\W{IDEOGRAPHS}]+(?:'[^\W{IDEOGRAPHS}]+)?)|(?P<mark>\S)")
_VOWEL = re.compile(r"[aeiouy]")


def normalise(text: str) -> str:
    """NFKC (full-width to half-width), lower case, traditional to simplified, hyphens to spaces."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_TABLE)


@lru_cache(maxsize=16384)
def stem(word: str) -> str:
    """One form for the regular inflections of an English word: plural, possessive, -ing, -ed, a final e.

    `suctioned`, `suctioning`, `suctions` -> `suction`; `irrigates`, `irrigating` -> `irrigat`. Irregular forms
    (`cut`, `held`) are the taxonomy's to list.
    """
    word = word.removesuffix("'s").removesuffix("'")
    if len(word) <= 3 or not word.isascii() or not word.isalpha():
        return word
    word = _singular(word)
    for ending in ("ing", "ed"):
        base = word.removesuffix(ending)
        if base != word and len(base) >= 3 and _VOWEL.search(base) and not word.endswith("eed"):
            if base[-1] == base[-2] and base[-1] not in "lsz":
                base = base[:-1]
            word = base
            break
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "ches", "shes", "zes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def units(text: str) -> tuple[str, ...]:
    """A phrase in comparable pieces: every Chinese character, every stemmed word, every mark by itself."""
    out: list[str] = []
    for match in PIECE.finditer(normalise(text)):
        if match.lastgroup == "word":
            out.append(stem(match[0]))
        else:
            out.extend(match[0])
    return tuple(out)


def weight_length(phrase: tuple[str, ...]) -> int:
    """Length in the sense of the label rule: 1 for a Chinese character, 2 for a word (so that scissors = 剪刀)."""
    return sum(2 if _is_word(unit) else 1 for unit in phrase)


def is_han(unit: str) -> bool:
    """A Chinese (Japanese, Korean) character, or a run of them."""
    match = PIECE.fullmatch(unit)
    return match is not None and match.lastgroup == "han"


def _is_word(unit: str) -> bool:
    match = PIECE.fullmatch(unit)
    return match is not None and match.lastgroup == "word"

T = TypeVar("T")


@dataclass(frozen=True)
class SplitText:
    """A text in units (see `lapwan.data.caption_text.units`); `boundary[i]`: a word begins or ends before unit i.

    `boundary` has one entry more than `units`: the end of the text.
    """

    units: tuple[str, ...]
    boundary: tuple[bool, ...]


@dataclass(frozen=True)
class Found(Generic[T]):
    """`what` stands at units[start:end]."""

    start: int
    end: int
    what: T


class Matcher(Generic[T]):
    """Finds phrases bounded by word edges: longer before shorter, then left before right, without overlap.

    A phrase inside an occurrence of a longer one is never found, even where that one gave way to a third.
    """

    def __init__(self, phrases: Iterable[tuple[tuple[str, ...], T]]) -> None:
        self._by_first: dict[str, list[tuple[tuple[str, ...], T]]] = {}
        for phrase, what in sorted(phrases, key=lambda p: -len(p[0])):
            self._by_first.setdefault(phrase[0], []).append((phrase, what))
        self.first_units = frozenset(self._by_first)

    def find(self, text: SplitText, taken: Sequence[tuple[int, int]] = ()) -> list[Found[T]]:
        """All matches outside the spans of `taken`, in order."""
        if self.first_units.isdisjoint(text.units):
            return []
        blocked = {at for start, end in taken for at in range(start, end)}
        candidates = [
            hit for at in range(len(text.units))
            if text.boundary[at] and (hit := self._longest(text, at, blocked)) is not None
        ]
        found: list[Found[T]] = []
        for hit in sorted(candidates, key=lambda f: (f.start - f.end, f.start)):
            inside = any(c.start <= hit.start and hit.end <= c.end and c is not hit for c in candidates)
            if not inside and not any(f.start < hit.end and hit.start < f.end for f in found):
                found.append(hit)
        return sorted(found, key=lambda f: f.start)

    def _longest(self, text: SplitText, at: int, blocked: set[int]) -> Found[T] | None:
        for phrase, what in self._by_first.get(text.units[at], ()):
            end = at + len(phrase)
            if text.units[at:end] == phrase and text.boundary[end] and blocked.isdisjoint(range(at, end)):
                return Found(at, end, what)
        return None
