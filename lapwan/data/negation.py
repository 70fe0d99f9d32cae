"""Negation: which mentions a text denies, such as 未使用剪刀, 剪刀未使用, without scissors, the hook is not used.

Two patterns, both inside a clause. A negator denies the mention it governs, over fillers and modifiers only
(未使用弯头剪刀, but not 无损伤抓钳 or 无出血电凝钩), the mentions joined to it (剪刀和吸引器, scissors or hook), and
what follows of the same family (未使用剪刀剪断). A mention is also denied by what follows it: a negator with a verb of
use or presence (剪刀未使用, scissors are not visible), or a withdrawal (电凝钩已撤出).

How to add a negation word: put it into the row of `_WORDS` with its roles, or add a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Flag, auto

from lapwan.data.caption_text import PhraseMatch, PhraseMatcher, SplitText, units


class _Role(Flag):
    OTHER = 0
    NEGATOR = auto()
    FORWARD = auto()  # a negator that governs only what follows it: `hook without suction` does not deny the hook
    LOOSE = auto()  # a negator or verb that allows modifiers before the mention
    FILLER = auto()
    DETERMINER = auto()
    USE = auto()  # a verb of use or presence
    AUXILIARY = auto()  # may come between a mention and the negator after it
    JOIN = auto()
    OR = auto()
    STOP = auto()  # ends the scope of a negator
    SOFT_STOP = auto()  # ends it only after its first mention
    WITHDRAWN = auto()  # denies the mention before it, without a negator
    LEAVES = auto()  # the same in the perfect: the hook has left the field; one that leaves is still seen
    PERFECT = auto()  # has, already, 已
    TAIL = auto()  # may follow a denying verb without being its object
    COMMA = auto()
    BREAK = auto()


_R = _Role
# Words separated by spaces; `_` is a space inside a phrase.
_WORDS: tuple[tuple[_Role, str], ...] = (
    (_R.NEGATOR, """
        未 没 没有 无 不 非 别 勿 莫 尚未 从未 并未 未曾 并不 并非 并无 并没有 从没 不再 未再 没再 毫无 不能 不可
        不宜 不得 不会 暂无 尚无 暂未 仍未 亦未 亦无 均无
        no not never neither nor none none_of yet_to cannot don't doesn't didn't isn't aren't wasn't weren't
        can't won't haven't hasn't hadn't couldn't shouldn't wouldn't needn't
    """),
    (_R.NEGATOR | _R.LOOSE, """
        无需 无须 毋需 毋须 不需 不需要 不须 不必 不用 没用 未用 未见 不见 没见 看不到 看不见 免用
        no_longer
    """),
    (_R.NEGATOR | _R.FORWARD | _R.LOOSE, """
        代替 替代 取代 而非 而不是 不是 避免 缺少 缺乏 不含 不包括 不包含 弃用 省去 不带 未带 未持
        停止使用 停用 暂停使用 放弃 舍弃
        free_from stop_using stopped_using refrain_from
        without instead_of rather_than in_place_of in_lieu_of absence_of lack_of free_of devoid_of avoid
    """),
    (_R.LEAVES, """
        撤出 退出 撤去 撤走 撤离 移除 移走 收起 移出 移开 离开 抽离 抽出 拔出 收回 消失 退离 换成 换为 更换为 更换成
        替换为 替换成 取出 撤
        withdrawn left exited removed taken_out taken_away put_away moved_out pulled_out retracted_out disappeared gone
        vanished replaced exchanged swapped
    """),
    (_R.USE | _R.LOOSE, """
        使用 用 采用 应用 动用 运用 利用 借助 启用 用到 用上 见 见到 看到 看见 可见 发现 出现 显示 参与 介入 入镜
        露出 用于 到位 到场 入画 存在 进入 进入画面 进入视野 进入镜头 进入术野 出现在画面 出现在视野 在场 置入 插入 伸入
        出镜
        use using used employ employed see seen show shown need needed require visible present active involve
        applied introduced inserted deployed engaged appear necessary in_use in_view in_frame in_the_field
        on_screen in_the_image in_sight in_the_frame in_the_view in_the_picture in_shot within_view utilize utilise
        available identified noted on_view
    """),
    (_R.FILLER, """
        需 需要 须 予 给予 行 进行 有 任何 再 持 以 通过 的 了 其他 其它 别的 额外 明显 一把 一个 把 个 腹腔镜
        器械 到 过 去 能 能够 必 曾 另 另外
        of for to further more additional other there help again ever yet
    """),
    (_R.FILLER | _R.DETERMINER, "the a an any this that its"),
    (_R.FILLER | _R.AUXILIARY, "be being been is are was were do does did"),
    (_R.FILLER | _R.AUXILIARY | _R.PERFECT, "has have had"),
    (_R.AUXILIARY | _R.PERFECT, "已 已经 均已 早已 业已 already"),
    (_R.AUXILIARY, """
        也 均 都 皆 尚 暂 暂时 并 此时 全程 始终 一直 本次 术中 目前 在旁 旁边 待命 闲置 松开 完全 缓慢 立即 迅速
        currently still both all remain idle idle_and now fully completely slowly then just
    """),
    (_R.JOIN, "和 与 及 以及 及其 跟 、 and / + &"),
    (_R.JOIN | _R.OR, "或 或者 或是 or nor"),
    (_R.SOFT_STOP | _R.FILLER, "直接 单独 同时 with"),
    (_R.STOP, """
        而 但 但是 却 改 改用 改为 改由 仅 仅用 只 只用 只有 而是 转而 换 换用 换成 即 即可 就 便 则 时 后 之后
        以后 前 之前 情况下 由
        but just only then while as so when after before instead by via
    """),
    (_R.WITHDRAWN, """
        已撤出 已撤离 已退出 已移出 已移除 已移走 已离开 已停用 已经撤出 已经退出 已经移出 停用 停止使用 暂停使用
        不在画面 不在视野 不在镜头 不在术野 不在场 未在画面 未在视野 没在画面
        画面外 视野外 镜头外
        absent unused nowhere nowhere_to_be_seen previously_used
        has_been_withdrawn have_been_withdrawn out_of_view out_of_frame not_in_use not_in_view
        out_of_sight out_of_the_field out_of_the_frame out_of_the_view off_screen offscreen no_longer_in_view
    """),
    (_R.TAIL, """
        画面 视野 镜头 术野 中 内 里 之中 当中 过 到 了 于 在 本段 视频 腹腔 体腔 操作区 手术区 画 外
        from of the view field frame screen scene image picture sight operative surgical abdomen cavity body
    """),
    (_R.COMMA, ","),
    (_R.BREAK, "。 . ; ! ? : … — ( ) [ ] 《 》 「 」 『 』 【 】 “ ”"),
)


def _vocabulary() -> dict[tuple[str, ...], _Role]:
    words: dict[tuple[str, ...], _Role] = {}
    for role, row in _WORDS:
        for word in row.split():
            words[units(word)] = words.get(units(word), _R.OTHER) | role
    return words


_VOCABULARY = _vocabulary()
_MATCHER = PhraseMatcher(_VOCABULARY.items())
_TRIGGERS = frozenset(word[0] for word, role in _VOCABULARY.items() if role & (_R.NEGATOR | _R.WITHDRAWN | _R.LEAVES))
_LOOSE_SLACK = 2  # modifiers allowed after a loose negator: 未使用 | 锋利 | 弯头 | 剪刀
_LATIN_SLACK = 1  # no monopolar scissors; Chinese bare negators take none: 无 | 损伤 | 抓钳


@dataclass(frozen=True)
class _Element:
    """A word of the text and its roles; `mention` is its index, or -1 for other words."""

    role: _Role
    mention: int = -1
    latin: bool = False


def negated(text: SplitText, mentions: Sequence[PhraseMatch[int]]) -> list[bool]:
    """For each mention (its `value` is the family), whether the text denies it."""
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
        if element.role & _R.NEGATOR and at not in used and not (at and elements[at - 1].role & _R.NEGATOR):
            denied |= _Scope(elements, at, mentions).denied()
    return [index in denied for index in range(len(mentions))]


def _elements(text: SplitText, mentions: Sequence[PhraseMatch[int]]) -> list[_Element]:
    spans = {m.start: (m.end, _Element(_R.OTHER, index)) for index, m in enumerate(mentions)}
    for word in _MATCHER.find(text, [(m.start, m.end) for m in mentions]):
        spans[word.start] = (word.end, _Element(word.value, latin=text.units[word.start].isascii()))
    out, at = [], 0
    while at < len(text.units):
        if at in spans:
            end, element = spans[at]
        else:
            end, element = at + 1, _Element(_R.OTHER, latin=text.units[at].isascii())
            while end < len(text.units) and not text.boundary[end] and end not in spans:
                end += 1
        out.append(element)
        at = end
    return out


def _denied_after(elements: list[_Element], at: int) -> int | None:
    """The negator's position, if what follows mention `at` denies it: 剪刀 均 未 使用, scissors are not visible."""
    begin = _after_gloss(elements, at)
    at = _skip(elements, begin, _R.AUXILIARY)
    if at >= len(elements):
        return None
    perfect = any(element.role & _R.PERFECT for element in elements[begin:at])
    if elements[at].role & _R.WITHDRAWN or (perfect and elements[at].role & _R.LEAVES):
        return at
    if not elements[at].role & _R.NEGATOR or elements[at].role & _R.FORWARD:
        return None
    verb = at
    if not (elements[at].role & _R.LOOSE and _ends(elements, at + 1)):  # 剪刀未用: the verb is in the negator
        verb = _skip(elements, at + 1, _R.AUXILIARY | _R.FILLER)
        if verb >= len(elements) or not elements[verb].role & _R.USE:
            return None
        # 吸引 未 见 出血 has an object and denies that; English has the passive here, which takes none
        if not elements[verb].latin and not _ends(elements, verb + 1):
            return None
    return at


def _after_gloss(elements: list[_Element], at: int) -> int:
    """What follows mention `at` and its gloss: 剪刀 (scissors) 已撤出."""
    if [bool(e.role & _R.BREAK) for e in elements[at + 1:at + 4]] == [True, False, True] and (
            elements[at + 2].mention >= 0):
        return at + 4
    inside = at >= 2 and elements[at - 1].role & _R.BREAK and elements[at - 2].mention >= 0
    return at + 2 if inside and elements[at + 1:at + 2] and elements[at + 1].role & _R.BREAK else at + 1


def _ends(elements: list[_Element], at: int) -> bool:
    at = _skip(elements, at, _R.TAIL)
    return at >= len(elements) or bool(elements[at].role & (_R.COMMA | _R.BREAK))


def _skip(elements: list[_Element], at: int, role: _Role) -> int:
    while at < len(elements) and elements[at].role & role:
        at += 1
    return at


def _joined_before(elements: list[_Element], at: int) -> set[int]:
    """The mention at `at` and those joined before it: 剪刀 和 电凝钩."""
    mentions = {elements[at].mention}
    joined = False
    for element in reversed(elements[:at]):
        if element.mention >= 0 and joined:
            mentions.add(element.mention)
            joined = False
        elif element.role & _R.JOIN:
            joined = True
        elif not element.role & _R.FILLER:
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
        self._slack = _LOOSE_SLACK if element.role & _R.LOOSE else _LATIN_SLACK if element.latin else 0
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
        if role & _R.NEGATOR and not role & _R.JOIN:
            return True  # a second negator starts its own scope, or lifts this one (not without scissors)
        if role & (_R.BREAK | _R.WITHDRAWN):
            return True
        if role & _R.COMMA:
            self._joined = self._family is not None and not self._drifted and self._list_goes_on(at + 1)
            return not self._joined
        return self._after_mention(role) if self._family is not None else self._before_mention(element)

    def _after_mention(self, role: _Role) -> bool:
        if role & _R.JOIN:
            self._joined = not self._drifted
        elif role & (_R.STOP | _R.SOFT_STOP):
            return True
        elif not role & (_R.FILLER | _R.AUXILIARY):
            self._drifted, self._joined = True, False
        return False

    def _before_mention(self, element: _Element) -> bool:
        role = element.role
        if role & _R.JOIN:
            self._lost &= not role & _R.OR
            self._stepped = False
        elif role & _R.USE and not self._lost:
            self._loosen(element)
        elif role & _R.STOP:
            return True
        elif role & _R.DETERMINER and self._stepped:
            self._lost = True  # without bleeding | the hook
        elif not role & (_R.FILLER | _R.AUXILIARY):
            self._slack -= 1
            self._stepped = True
            self._lost |= self._slack < 0
        return False

    def _list_goes_on(self, at: int) -> bool:
        """Whether a comma is inside `A, B or C`: more mentions, and an `or` before the last."""
        alternatives = False
        while at < len(self._elements):
            element = self._elements[at]
            if element.role & _R.JOIN:
                alternatives |= bool(element.role & _R.OR)
            elif element.mention >= 0:
                if alternatives:
                    return True
            elif not element.role & (_R.FILLER | _R.COMMA):
                return False
            at += 1
        return False
