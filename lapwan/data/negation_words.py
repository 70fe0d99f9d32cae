"""The words that deny a mention, and those that bound what they deny; `negation.py` has the rules.

How to add a word: put it into the row of `_WORDS` with its roles, or add a row.
"""

from __future__ import annotations

from enum import Flag, auto

from lapwan.data.caption_text import PhraseMatcher, units


class NegationRole(Flag):
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
    COLON = auto()
    HELD = auto()  # like USE, but only before the mention: nobody holds the hook; the hook does not hold is at work
    LAST = auto()  # like USE at the end of a clause: scissors not in yet
    LATER = auto()  # after a verb of use: the hook comes in later
    FINAL = auto()  # denies the mention before it if it ends the clause: scissors requested, hook: none
    PENDING = auto()  # denies what follows, or a mention before it that is to be used: asks for scissors
    UNTIL = auto()  # before the hook is introduced
    THEN_GONE = auto()  # once the hook was removed
    OUT = auto()  # gone, after THEN_GONE
    ALL = auto()  # joins a list with commas: hook, scissors both absent
    RETURN = auto()  # takes a withdrawal back
    PRIOR = auto()  # makes a departure one that is over
    PRIOR_END = auto()  # ends such a phrase: 在片段开始前
    FOOTAGE = auto()  # what such a phrase is about


_R = NegationRole
# Words separated by spaces; `_` is a space inside a phrase.
_WORDS: tuple[tuple[NegationRole, str], ...] = (
    (_R.NEGATOR, """
        未 没 没有 无 不 非 别 勿 莫 尚未 从未 并未 未曾 并不 并非 并无 并没有 从没 不再 未再 没再 毫无 不能 不可
        还没 还没有 还未 仍没 仍没有 没能 未能 不宜 不得 不会 暂无 尚无 暂未 仍未 亦未 亦无 均无
        no not never neither nor none none_of yet_to cannot don't doesn't didn't isn't aren't wasn't weren't
        can't won't haven't hasn't hadn't couldn't shouldn't wouldn't needn't
    """),
    (_R.NEGATOR | _R.LOOSE, """
        无需 无须 毋需 毋须 不需 不需要 不须 不必 不用 没用 未用 未见 不见 没见 看不到 看不见 免用
        没人 无人 没看到 没看见 未看到 没拍到 没开 未开 没打开 未打开 没用到 没用上 没用过 没拿 未拿 没上 没动 没带
        no_longer nobody no_one no_sign_of no_trace_of no_evidence_of nothing_of
    """),
    (_R.NEGATOR | _R.FORWARD | _R.LOOSE, """
        代替 替代 取代 而非 而不是 不是 避免 缺少 缺乏 不含 不包括 不包含 弃用 省去 不带 未带 未持
        停止使用 停用 暂停使用 放弃 舍弃
        free_from stop_using stopped_using refrain_from
        without instead_of rather_than in_place_of in_lieu_of absence_of lack_of free_of devoid_of avoid
        after_removal_of after_removing after_withdrawing after_withdrawal_of after_taking_out having_removed
        following_removal_of
    """),
    (_R.NEGATOR | _R.FORWARD | _R.LOOSE | _R.PENDING, """
        准备 拟 拟用 拟以 拟行 计划 打算 即将 预备 下一步 等待 等候 正等 待 要求递 请求 呼叫 示意递 索要 主刀要 术者要
        ask_for call_for wait_for wait_on await request send_for about_to prepare_to prepare_for ready_for
        plan_to going_to next_step next_up up_next planned
    """),
    (_R.LEAVES, """
        撤出 退出 撤去 撤走 撤离 移除 移走 收起 移出 移开 离开 抽离 抽出 拔出 收回 消失 退离 换成 换为 更换为 更换成
        替换为 替换成 取出 撤 离场 退场 拿走 取走 收走 拿出 拿开 撤掉 撤下 拔走 退走 抽走 退下
        withdrawn brought_out took_out drawn_out left exited removed taken_out taken_away put_away moved_out pulled_out
        retracted_out disappeared gone vanished replaced exchanged swapped
    """),
    (_R.USE | _R.LOOSE, """
        使用 用 采用 应用 动用 运用 利用 借助 启用 用到 用上 见 见到 看到 看见 可见 发现 出现 显示 参与 介入 入镜
        露出 用于 到位 到场 入画 存在 进入 进入画面 进入视野 进入镜头 进入术野 出现在画面 出现在视野 在场 置入 插入 伸入
        出镜 就位 来 进来 进场 进镜 进腹 进入腹腔 登场 上场 现身 到达 抵达 过来 拿来 递来 递上 递到
        伸进来 伸进 入场 入腹
        come come_in came_in brought_in bring_in arrive enter return handed_over passed_in put_in
        use using used employ employed see seen show shown need needed require visible present active involve
        applied introduced inserted deployed engaged appear necessary in_use in_view in_frame in_the_field
        on_screen in_the_image in_sight in_the_frame in_the_view in_the_picture in_shot within_view utilize utilise
        available identified noted on_view in_the_picture around
    """),
    (_R.HELD | _R.LOOSE, "持 握 拿 拿着 握着 手持 hold carry handle pick_up took taken grab"),
    (_R.FILLER, """
        需 需要 须 予 给予 行 进行 有 任何 再 持 以 通过 的 了 其他 其它 别的 额外 明显 一把 一个 把 个 腹腔镜
        器械 到 过 去 能 能够 必 曾 另 另外
        of for to further more additional other there help again ever yet
    """),
    (_R.FILLER | _R.DETERMINER, "the a an any this that its"),
    (_R.FILLER | _R.AUXILIARY, "be being been is are was were do does did"),
    (_R.FILLER | _R.AUXILIARY | _R.PERFECT, "has have had"),
    (_R.AUXILIARY | _R.PERFECT, "已 已经 均已 早已 业已 已被 就已 就已经 早就 都已 也已 already"),
    (_R.AUXILIARY, """
        此刻 现在
        就 便 也 尚 暂 暂时 还 仍 此前 先前 早先 早前 刚才 之前 被 并 此时 全程 始终 一直 本次 术中 目前
        在旁 旁边 待命 闲置 松开 完全 缓慢 立即 迅速
        currently still remain idle idle_and now fully completely slowly then just
    """),
    (_R.AUXILIARY | _R.ALL, "均 都 皆 全都 全部 both all"),
    (_R.JOIN, "和 与 及 以及 及其 跟 、 and / + &"),
    (_R.JOIN | _R.OR, "或 或者 或是 or nor"),
    (_R.SOFT_STOP | _R.FILLER, "直接 单独 同时 with"),
    (_R.STOP, """
        而 但 但是 却 改 改用 改为 改由 仅 仅用 只 只用 只有 而是 转而 换 换用 换成 即 即可 就 便 则 时
        情况下 由 除 除了
        but just only then while as so when instead by via except besides other_than apart_from
    """),
    (_R.WITHDRAWN, """
        已撤出 已撤离 已退出 已移出 已移除 已移走 已离开 已停用 已经撤出 已经退出 已经移出 停用 停止使用 暂停使用
        不在画面 不在视野 不在镜头 不在术野 不在场 未在画面 未在视野 没在画面
        画面外 视野外 镜头外 镜外 画外 不见踪影 不见了 缺席 缺如 不在了 不在此 无踪影 没踪影 已不在 在体外 仍在体外
        在外面 还在外面
        撤了 撤走了 拿走了 收走了 退走了 取走了 出去了 退出去了 outside_the_abdomen outside_the_body
        missing off_camera out_of_shot outside_the_frame outside_the_view outside_the_field outside_the_picture
        outside_the_image outside_of_the_frame outside_of_the_view no_longer_there no_longer_here no_longer_around
        no_longer_present no_longer_in_use is_gone are_gone was_gone were_gone long_gone gone_already
        absent unused nowhere nowhere_to_be_seen previously_used
        has_been_withdrawn have_been_withdrawn out_of_view out_of_frame not_in_use not_in_view
        out_of_sight out_of_the_field out_of_the_frame out_of_the_view off_screen offscreen no_longer_in_view
    """),
    (_R.TAIL, """
        画面 视野 镜头 术野 中 内 里 之中 当中 过 到 了 于 在 本段 视频 腹腔 体腔 操作区 手术区 画 外
        from of the view field frame screen scene image picture sight operative surgical abdomen cavity body way
    """),
    (_R.NEGATOR | _R.FINAL, "not_yet"),
    (_R.LAST, "in here there outside"),
    (_R.LATER, "下一步 next_step next_up up_next planned later next afterwards afterward soon shortly"),
    (_R.PENDING, "will shall to_be 稍后 待会 待会儿 将要 将会 马上"),
    (_R.FINAL, """
        requested awaited pending gone
        outside en_route on_the_way on_its_way
        不在 没到 未到 还没到 尚未到 没来 还没来
        yet_to_come to_come to_follow is_next are_next none nil
    """),
    (_R.STOP | _R.THEN_GONE, "after"),
    (_R.THEN_GONE, "once since with following now_that"),
    (_R.STOP | _R.UNTIL | _R.PRIOR, "before prior_to"),
    (_R.UNTIL, "until till"),
    (_R.PRIOR, "未再出现 不再出现 再未出现 earlier previously beforehand"),
    (_R.STOP | _R.PRIOR_END, "前 之前 以前"),
    (_R.STOP, "后 之后 以后"),
    (_R.FOOTAGE, "片段 短片 视频 录像 录制 拍摄 本段 片子 clip video recording footage 开始"),
    (_R.OUT, "out away gone off"),
    (_R.RETURN, """
        重新 再次 再度 返回 回来 复入 又进 又进入 再进 再进入 回到 重返
        return reenter re_enter come_back came_back back_in is_back are_back back_again now_back reappear reinsert
        reintroduce
    """),
    (_R.COMMA, ","),
    (_R.BREAK | _R.COLON, ": = ("),
    (_R.BREAK, "。 . ; ! ? … — ) [ ] 《 》 「 」 『 』 【 】 “ ”"),
)


def _vocabulary() -> dict[tuple[str, ...], NegationRole]:
    words: dict[tuple[str, ...], NegationRole] = {}
    for role, row in _WORDS:
        for word in row.split():
            words[units(word)] = words.get(units(word), _R.OTHER) | role
    return words


_VOCABULARY = _vocabulary()
MATCHER = PhraseMatcher(_VOCABULARY.items())
TRIGGERS = frozenset(
    word[0] for word, role in _VOCABULARY.items()
    if role & (_R.NEGATOR | _R.WITHDRAWN | _R.LEAVES | _R.FINAL | _R.PENDING | _R.UNTIL | _R.THEN_GONE | _R.PRIOR_END)
)
