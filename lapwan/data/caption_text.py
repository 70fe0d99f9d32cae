"""The text of captions: normalisation, Chinese word segmentation (jieba), and the longest match of phrases.

Normalisation makes full-width forms, case, traditional characters and regular English inflections equal. Segmentation
finds word boundaries in Chinese, so that 呼吸 does not count as a mention of 吸.

How to add a character: append the pair to `_TRADITIONAL`; only characters that occur in instrument vocabulary, in
negations, or beside them matter here.
"""

from __future__ import annotations

import logging
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

T = TypeVar("T")

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
TOKEN = re.compile(rf"(?P<han>[{IDEOGRAPHS}]+)|(?P<word>[^\W{IDEOGRAPHS}]+(?:'[^\W{IDEOGRAPHS}]+)?)|(?P<mark>\S)")
_VOWEL = re.compile(r"[aeiouy]")


def normalise_text(text: str) -> str:
    """NFKC (full-width to half-width), lower case, traditional to simplified, hyphens to spaces."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_TABLE)


@lru_cache(maxsize=16384)
def stem(word: str) -> str:
    """One form for the regular inflections of an English word: plural, possessive, -ing, -ed, a final e.

    `suctioned`, `suctioning`, `suctions` -> `suction`; `irrigates`, `irrigating` -> `irrigat`. Irregular forms
    (`cut`, `held`) have to be listed in the taxonomy.
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
    """A phrase in comparable units: each Chinese character, each stemmed word, each punctuation mark."""
    out: list[str] = []
    for match in TOKEN.finditer(normalise_text(text)):
        if match.lastgroup == "word":
            out.append(stem(match[0]))
        else:
            out.extend(match[0])
    return tuple(out)


def weight_length(phrase: tuple[str, ...]) -> int:
    """Length by which the label rule weighs a phrase: 1 per Chinese character, 2 per word (scissors = 剪刀)."""
    return sum(2 if _is_word(unit) else 1 for unit in phrase)


def is_han(unit: str) -> bool:
    """A Chinese (Japanese, Korean) character, or a run of them."""
    match = TOKEN.fullmatch(unit)
    return match is not None and match.lastgroup == "han"


def _is_word(unit: str) -> bool:
    match = TOKEN.fullmatch(unit)
    return match is not None and match.lastgroup == "word"


# Word frequencies for phrases of the taxonomy, against jieba's total of 6e7. High enough that the phrase is preferred
# to its own parts, low enough that a common word across its edge wins: 呼吸|引起 has no 吸引.
_FREQUENCY = {2: 20_000}
_FREQUENCY_LONG = 200_000
_FREQUENCY_VERB = 5_000


@dataclass(frozen=True)
class SplitText:
    """A text in units (see `units`); `boundary[i]`: a word begins or ends before unit i.

    `boundary` has one entry more than `units`: the end of the text. `words`: the units before stemming.
    """

    units: tuple[str, ...]
    boundary: tuple[bool, ...]
    words: tuple[str, ...] = ()


class ChineseSegmenter:
    """jieba's maximum-probability segmentation, with `phrases` added to its dictionary.

    `verbs` are those of the phrases that give way to a noun across their edge: 抓钳|夹 has no 钳夹. It holds
    its own tokenizer and changes none of jieba's global state.
    """

    def __init__(self, phrases: Iterable[str], verbs: Iterable[str] = ()) -> None:
        frequencies, total = _jieba_dictionary()
        import jieba  # after _jieba_dictionary, which silences it

        self._jieba = jieba.Tokenizer()
        self._jieba.FREQ, self._jieba.total = frequencies.copy(), total
        self._jieba.initialized = True
        weaker = frozenset(verbs)
        for phrase in phrases:
            if len(phrase) > 1:  # a single character keeps its own frequency, or it would split common words
                frequency = _FREQUENCY.get(len(phrase), _FREQUENCY_LONG)
                if phrase in weaker:
                    frequency = _FREQUENCY_VERB
                self._jieba.add_word(phrase, max(frequency, frequencies.get(phrase, 0)))

    def words(self, text: str) -> list[str]:
        """Consecutive words of a run of Chinese characters."""
        # HMM off: it invents words from single characters and could swallow a keyword
        words: list[str] = self._jieba.lcut(text, HMM=False)
        return words

    def split(self, text: str) -> SplitText:
        """A text, normalised, in units with its word boundaries."""
        out: list[str] = []
        words: list[str] = []
        boundary: list[bool] = []
        for match in TOKEN.finditer(normalise_text(text)):
            if match.lastgroup == "han":
                for word in self.words(match[0]):
                    out += word
                    words += word
                    boundary += [True, *[False] * (len(word) - 1)]
            else:
                out.append(stem(match[0]) if match.lastgroup == "word" else match[0])
                words.append(match[0])
                boundary.append(True)
        return SplitText(tuple(out), (*boundary, True), tuple(words))


@lru_cache(maxsize=1)
def _jieba_dictionary() -> tuple[dict[str, int], int]:
    # Read straight from the package: jieba's own cache in a world-writable temporary folder is no faster, and trusted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jieba
    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    pair: tuple[dict[str, Any], int] = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    return pair


@dataclass(frozen=True)
class PhraseMatch(Generic[T]):
    """A phrase at units[start:end]; `value` is what the matcher was given for it."""

    start: int
    end: int
    value: T


class PhraseMatcher(Generic[T]):
    """Finds phrases bounded by word edges: longer before shorter, then left before right, without overlap.

    A phrase inside an occurrence of a longer one never matches, even if that occurrence itself lost to a third.
    Words of `modifiers` may come between the words of a phrase: `bipolar forceps` matches bipolar Maryland forceps.
    """

    def __init__(
        self, phrases: Iterable[tuple[tuple[str, ...], T]], modifiers: Iterable[tuple[str, ...]] = ()
    ) -> None:
        self._by_first: dict[str, list[tuple[tuple[str, ...], T]]] = {}
        self._modifiers: dict[str, list[tuple[str, ...]]] = {}
        for modifier in sorted(modifiers, key=len, reverse=True):
            self._modifiers.setdefault(modifier[0], []).append(modifier)
        for phrase, value in sorted(phrases, key=lambda p: -len(p[0])):
            self._by_first.setdefault(phrase[0], []).append((phrase, value))
        self.first_units = frozenset(self._by_first)

    def find(self, text: SplitText, taken: Sequence[tuple[int, int]] = ()) -> list[PhraseMatch[T]]:
        """All matches outside the spans of `taken`, in order."""
        if self.first_units.isdisjoint(text.units):
            return []
        blocked = {at for start, end in taken for at in range(start, end)}
        candidates = [
            match for at in range(len(text.units))
            if text.boundary[at] and (match := self._longest(text, at, blocked)) is not None
        ]
        matches: list[PhraseMatch[T]] = []
        for match in sorted(candidates, key=lambda m: (m.start - m.end, m.start)):
            inside = any(c.start <= match.start and match.end <= c.end and c is not match for c in candidates)
            if not inside and not any(m.start < match.end and match.start < m.end for m in matches):
                matches.append(match)
        return sorted(matches, key=lambda m: m.start)

    def _longest(self, text: SplitText, at: int, blocked: set[int]) -> PhraseMatch[T] | None:
        for phrase, value in self._by_first.get(text.units[at], ()):
            end = self._end(text, at, phrase)
            if end and text.boundary[end] and blocked.isdisjoint(range(at, end)):
                return PhraseMatch(at, end, value)
        return None

    def _end(self, text: SplitText, at: int, phrase: tuple[str, ...]) -> int:
        """The end of `phrase` at unit `at`, modifiers skipped; 0 if it is not there."""
        if text.units[at:at + len(phrase)] == phrase:
            return at + len(phrase)
        if not self._modifiers:
            return 0
        for unit in phrase:
            while at < len(text.units) and text.units[at] != unit:
                if not text.boundary[at] or not (length := self._modifier(text, at)):
                    return 0
                at += length
            if at == len(text.units):
                return 0
            at += 1
        return at

    def _modifier(self, text: SplitText, at: int) -> int:
        candidates = self._modifiers.get(text.units[at], ())
        return next((len(m) for m in candidates if text.units[at:at + len(m)] == m), 0)
