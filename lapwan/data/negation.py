"""Which mentions a text denies: 未使用剪刀, 没有, 无需, without scissors, no suction, 剪刀未使用, the hook is not used.

Two patterns, both inside a clause. A negator denies the mention it governs, over fillers and modifiers only
(未使用弯头剪刀, but not 无损伤抓钳 or 无出血电凝钩), the mentions joined to it (剪刀和吸引器, scissors or hook), and
what follows of the same family (未使用剪刀剪断). A mention is also denied by what follows it: a negator with a verb of
use or presence (剪刀未使用, scissors are not visible), or a withdrawal (电凝钩已撤出).

How to add a word: a row of `_WORDS`, with the parts it can play.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Flag, auto

from lapwan.data.caption_text import Found, Matcher, SplitText, units


class _Part(Flag):
    OTHER = 0
    NEGATOR = auto()
    AHEAD = auto()  # a negator that only governs what comes after it: `hook without suction` does not deny the hook
    LOOSE = auto()  # a negator or verb after which modifiers may stand before the mention
    FILLER = auto()
    DETERMINER = auto()
    USE = auto()  # a verb of use or presence
    AUXILIARY = auto()  # may stand between a mention and the negator after it
    JOIN = auto()
    OR = auto()
    STOP = auto()  # ends what a negator governs
    SOFT_STOP = auto()  # ends it only once it has met its mention
    GONE = auto()  # denies the mention before it, without a negator
    TAIL = auto()  # may follow a denying verb without being its object
    COMMA = auto()
    BREAK = auto()


_P = _Part
# Words separated by spaces; `_` stands for a space inside a phrase.
_WORDS: tuple[tuple[_Part, str], ...] = (
    (_P.NEGATOR, """
        未 没 没有 无 不 非 别 勿 莫 尚未 从未 并未 未曾 并不 并非 并无 并没有 从没 不再 未再 没再 毫无 不能 不可
        不宜 不得 不会
        no not never neither nor cannot don't doesn't didn't isn't aren't wasn't weren't can't won't haven't
        hasn't hadn't couldn't shouldn't wouldn't needn't
    """),
    (_P.NEGATOR | _P.LOOSE, """
        无需 无须 毋需 毋须 不需 不需要 不须 不必 不用 没用 未用 未见 不见 没见 看不到 看不见 免用
        no_longer
    """),
    (_P.NEGATOR | _P.AHEAD | _P.LOOSE, """
        代替 替代 取代 而非 而不是 不是 避免 缺少 缺乏 不含 不包括 不包含
        without instead_of rather_than in_place_of in_lieu_of absence_of lack_of free_of avoid
    """),
    (_P.USE | _P.LOOSE, """
        使用 用 采用 应用 动用 运用 利用 借助 启用 用到 用上 见 见到 看到 看见 可见 发现 出现 显示 参与 介入 入镜
        露出 存在 进入 进入画面 进入视野 进入镜头 进入术野 出现在画面 出现在视野 在场 置入 插入 伸入 出镜
        use using used employ employed see seen show shown need needed require visible present active involve
        applied introduced inserted deployed engaged appear necessary in_use in_view in_frame in_the_field
        on_screen in_the_image
    """),
    (_P.FILLER, """
        需 需要 须 予 给予 行 进行 有 任何 再 持 以 通过 的 了 其他 其它 别的 额外 明显 一把 一个 把 个 腹腔镜
        器械 到 过 去 能 能够 必 曾 另 另外
        of for to further more additional other there help again ever yet
    """),
    (_P.FILLER | _P.DETERMINER, "the a an any this that its"),
    (_P.FILLER | _P.AUXILIARY, "be being been is are was were has have had do does did"),
    (_P.AUXILIARY, """
        也 均 都 皆 尚 暂 暂时 并 已 此时 全程 始终 一直 本次 术中 目前
        currently still both all remain
    """),
    (_P.JOIN, "和 与 及 以及 及其 跟 、 and / + &"),
    (_P.JOIN | _P.OR, "或 或者 或是 or nor"),
    (_P.SOFT_STOP | _P.FILLER, "直接 单独 同时 with"),
    (_P.STOP, """
        而 但 但是 却 改 改用 改为 改由 仅 仅用 只 只用 只有 而是 转而 换 换用 换成 即 即可 就 便 则 时 后 之后
        以后 前 之前 情况下 由
        but just only then while as so when after before instead by via
    """),
    (_P.GONE, """
        已撤出 已撤离 已退出 已移出 已移除 已移走 已离开 已停用 已经撤出 已经退出 已经移出 停用 停止使用 暂停使用
        不在画面 不在视野 不在镜头 不在术野 不在场 未在画面 未在视野 没在画面
        absent unused has_been_withdrawn have_been_withdrawn out_of_view out_of_frame not_in_use not_in_view
    """),
    (_P.TAIL, "画面 视野 镜头 术野 中 内 里 之中 当中 过 到 了 于 在 本段 视频"),
    (_P.COMMA, ","),
    (_P.BREAK, "。 . ; ! ? : … — ( ) [ ] 《 》 「 」 『 』 【 】 “ ”"),
)


def _vocabulary() -> dict[tuple[str, ...], _Part]:
    words: dict[tuple[str, ...], _Part] = {}
    for part, row in _WORDS:
        for word in row.split():
            words[units(word)] = words.get(units(word), _P.OTHER) | part
    return words


_VOCABULARY = _vocabulary()
_MATCHER = Matcher(_VOCABULARY.items())
_TRIGGERS = frozenset(word[0] for word, part in _VOCABULARY.items() if part & (_P.NEGATOR | _P.GONE))
_LOOSE_SLACK = 2  # modifiers allowed after a loose negator: 未使用 | 锋利 | 弯头 | 剪刀
_LATIN_SLACK = 1  # no monopolar scissors; Chinese bare negators take none: 无 | 损伤 | 抓钳


@dataclass(frozen=True)
class _Element:
    """A word of the text and the parts it can play; `mention` is its index, or -1."""

    part: _Part
    mention: int = -1
    latin: bool = False


def negated(text: SplitText, mentions: Sequence[Found[int]]) -> list[bool]:
    """For each mention (`what` is its family), whether the text denies it."""
    if not mentions or _TRIGGERS.isdisjoint(text.units):
        return [False] * len(mentions)
    elements = _elements(text, mentions)
    denied: set[int] = set()
    used: set[int] = set()
    for at, element in enumerate(elements):
        if element.mention >= 0 and (negator := _denied_after(elements, at)) is not None:
            denied |= _joined_before(elements, at)
            used.add(negator)
    for at, element in enumerate(elements):
        if element.part & _P.NEGATOR and at not in used and not (at and elements[at - 1].part & _P.NEGATOR):
            denied |= _Scope(elements, at, mentions).denied()
    return [index in denied for index in range(len(mentions))]


def _elements(text: SplitText, mentions: Sequence[Found[int]]) -> list[_Element]:
    spans = {m.start: (m.end, _Element(_P.OTHER, index)) for index, m in enumerate(mentions)}
    for word in _MATCHER.find(text, [(m.start, m.end) for m in mentions]):
        spans[word.start] = (word.end, _Element(word.what, latin=text.units[word.start].isascii()))
    out, at = [], 0
    while at < len(text.units):
        if at in spans:
            end, element = spans[at]
        else:
            end, element = at + 1, _Element(_P.OTHER, latin=text.units[at].isascii())
            while end < len(text.units) and not text.boundary[end] and end not in spans:
                end += 1
        out.append(element)
        at = end
    return out


def _denied_after(elements: list[_Element], at: int) -> int | None:
    """The place of the negator when what follows mention `at` denies it: 剪刀 均 未 使用, scissors are not visible."""
    at = _skip(elements, at + 1, _P.AUXILIARY)
    if at >= len(elements):
        return None
    if elements[at].part & _P.GONE:
        return at
    if not elements[at].part & _P.NEGATOR or elements[at].part & _P.AHEAD:
        return None
    verb = at
    if not (elements[at].part & _P.LOOSE and _ends(elements, at + 1)):  # 剪刀未用: the verb is in the negator
        verb = _skip(elements, at + 1, _P.AUXILIARY | _P.FILLER)
        if verb >= len(elements) or not elements[verb].part & _P.USE:
            return None
        # 吸引 未 见 出血 has an object and denies that; English has the passive here, which takes none
        if not elements[verb].latin and not _ends(elements, verb + 1):
            return None
    return at


def _ends(elements: list[_Element], at: int) -> bool:
    at = _skip(elements, at, _P.TAIL)
    return at >= len(elements) or bool(elements[at].part & (_P.COMMA | _P.BREAK))


def _skip(elements: list[_Element], at: int, part: _Part) -> int:
    while at < len(elements) and elements[at].part & part:
        at += 1
    return at


def _joined_before(elements: list[_Element], at: int) -> set[int]:
    """The mention at `at` and those joined before it: 剪刀 和 电凝钩."""
    found = {elements[at].mention}
    joined = False
    for element in reversed(elements[:at]):
        if element.mention >= 0 and joined:
            found.add(element.mention)
            joined = False
        elif element.part & _P.JOIN:
            joined = True
        elif not element.part & _P.FILLER:
            break
    return found


class _Scope:
    """What the negator at `at` governs, read to the right until something ends it."""

    def __init__(self, elements: list[_Element], at: int, mentions: Sequence[Found[int]]) -> None:
        self._elements, self._at, self._mentions = elements, at, mentions
        self._hit: int | None = None  # family of the last denied mention
        self._joined = False  # a conjunction since
        self._drifted = False  # other words since
        self._lost = False  # too many words before the first mention
        self._loosen(elements[at])

    def _loosen(self, element: _Element) -> None:
        self._slack = _LOOSE_SLACK if element.part & _P.LOOSE else _LATIN_SLACK if element.latin else 0
        self._stepped = False

    def denied(self) -> set[int]:
        found: set[int] = set()
        for at in range(self._at + 1, len(self._elements)):
            element = self._elements[at]
            if element.mention >= 0:
                if not self._governs(element.mention):
                    break
                found.add(element.mention)
            elif self._ended(element, at):
                break
        return found

    def _governs(self, mention: int) -> bool:
        family = self._mentions[mention].what
        if (self._lost and self._hit is None) or (self._hit not in (None, family) and not self._joined):
            return False
        self._hit, self._joined, self._drifted = family, False, False
        return True

    def _ended(self, element: _Element, at: int) -> bool:
        """Take one word that is no mention; True when the negator's reach ends with it."""
        part = element.part
        if part & _P.NEGATOR and not part & _P.JOIN:
            return True  # a second negator starts its own scope, or lifts this one (not without scissors)
        if part & (_P.BREAK | _P.GONE):
            return True
        if part & _P.COMMA:
            self._joined = self._hit is not None and not self._drifted and self._list_goes_on(at + 1)
            return not self._joined
        return self._after_hit(part) if self._hit is not None else self._before_hit(element)

    def _after_hit(self, part: _Part) -> bool:
        if part & _P.JOIN:
            self._joined = not self._drifted
        elif part & (_P.STOP | _P.SOFT_STOP):
            return True
        elif not part & (_P.FILLER | _P.AUXILIARY):
            self._drifted, self._joined = True, False
        return False

    def _before_hit(self, element: _Element) -> bool:
        part = element.part
        if part & _P.JOIN:
            self._lost &= not part & _P.OR
            self._stepped = False
        elif part & _P.USE and not self._lost:
            self._loosen(element)
        elif part & _P.STOP:
            return True
        elif part & _P.DETERMINER and self._stepped:
            self._lost = True  # without bleeding | the hook
        elif not part & (_P.FILLER | _P.AUXILIARY):
            self._slack -= 1
            self._stepped = True
            self._lost |= self._slack < 0
        return False

    def _list_goes_on(self, at: int) -> bool:
        """Whether a comma stands inside `A, B or C`: more mentions, and an `or` before the last."""
        alternatives = False
        while at < len(self._elements):
            element = self._elements[at]
            if element.part & _P.JOIN:
                alternatives |= bool(element.part & _P.OR)
            elif element.mention >= 0:
                if alternatives:
                    return True
            elif not element.part & (_P.FILLER | _P.COMMA):
                return False
            at += 1
        return False
