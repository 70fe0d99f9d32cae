"""The words by which `mention_roles.py` tells what a mention does in its clause.

How to add a word: put it into its row.
"""

from __future__ import annotations

import re

from lapwan.data.caption_text import PhraseMatcher, units


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
SENTENCE_END = frozenset("。.;!?…")
CLAUSE_START = PhraseMatcher((word, True) for word in _phrases("""
    , : 、 ( ) — 后 之后 以后 并 并且 再 然后 随后 接着 继而 同时 而 但 但是 用 以 使用 采用 借助 由 和 与 及 以及 改用
    and then while whereas as after before when until but so followed_by or
"""))
DETERMINERS = _words("the a an this that these those its his her their our my your each every both any some another")
NUMBERS = _words("one two three four five several many multiple few all")
PREPOSITIONS = _words("""
    of in on at from into onto between behind below above under over near around along through across against toward
    towards beside beyond within for with by using per via to off
""")
FUNCTION_WORDS = DETERMINERS | PREPOSITIONS | _words("""
    and or nor but then while as when until so is are was were be been being has have had do does did not away up out
    down back it them him further again completely together until
""")
AUXILIARIES = _words("is are was were be been being am get gets")
PERFECT = _words("has have had")
EARLIER = _words("already previously just recently formerly earlier")
PRONOUNS = _words("i we he she they you it who which")
BEFORE_VERB = _words("to will would can could may might must should shall does do did not")
PARTICIPLES = _words("cut held torn burnt split")
CHINESE_EARLIER = _phrases("已 已经 已被 均已 刚 刚刚 曾 业已")
CHINESE_NOUN_ENDS = frozenset("钳镊刀剪钩器夹针线袋管头棒布条极套仪子锯铲圈卡网")
RESULT = re.compile(r"(后|过|好|完|了)?(的|处(?![理置于在])|端|线|面|痕)|之前|以前|前(?![方壁端侧缘])")
STILL_AT_WORK = re.compile(r"的?(方式|方法|同时|过程|时候|情况|器械|作用|效果|操作)")
CHINESE_NEAR = re.compile(r"(之间|间|旁|处|远端|近端|远侧|近侧|上方|下方|外侧|内侧|附近)")
NEAR = _words("between near beside above below beyond distal proximal behind around along")
SUBJECTS = PhraseMatcher((word, True) for word in _phrases("""
    助手 术者 主刀 左手 右手 医生 护士 另一 assistant surgeon operator
"""))
# What makes a material an instrument at work; verbs that are keywords themselves need no entry
APPLIED = PhraseMatcher((word, True) for word in _phrases("""
    上 放置 置入 置 放 施 施加 施放 释放 打 打上 打入 套 套上 锁 锁闭 锁扣 扣 夹 夹闭 夹住 钳夹 双重 应用 使用 用 以
    置放 安放 击发 缝 缝合 结扎 捆扎 收紧 拉紧 打结 穿过 穿 刺入 刺 插入 置于 推结 缠绕 压迫 填塞 擦拭 拭净 蘸 擦
    go_on goes_on place apply applied fire deploy close occlude secure load put lock squeeze clamp clamped insert
    position use using tie tied tying pass drive tighten throw threw run sew stitch ligate seal pull loop press pack
    dab wipe soak
    introduce enter advance approach
"""))
TO_COME = PhraseMatcher((word, True) for word in _phrases("""
    准备 拟 即将 将要 打算 计划 预备 等待 等候 待 下一步 尚未 还没 还未 未开始
    about_to prepare_to preparing_to ready_to ready_for prepare_for preparing_for going_to next_step next_up up_next
    planned plan_to wait_for await scheduled not_yet yet_to
    not_started not_begun
"""))
LOOKALIKE = frozenset({*"样状形", *map("".join, _phrases("like shaped"))})
VIEWERS = PhraseMatcher((word, True) for word in _phrases("镜头 摄像头 camera lens"))
UNDER_VIEW = frozenset("下中内里")
JAWS = frozenset({"钳", "镊", "极", *map("".join, _phrases("forceps grasper tweezers bipolar clamp holder driver"))})
CURRENT = frozenset({"极", *map("".join, _phrases("bipolar monopolar"))})
NEEDS_CURRENT = frozenset({
    *"电凝灼", *map("".join, _phrases("cauterize cauterise electrocoagulate electrocauterize coagulate"))
})
NOT_BEGUN = re.compile(
    r"(操作|步骤)?(即将|正式)?(开始)?(之前|以前|前(?![方壁端侧缘]))|尚未|还未|还没|未开始"
    r"|will(soon|shortly)?(begin|start)|(has|have|had|is)?not(yet)?(begun|start)|yettostart"
)
BEFORE = re.compile(r"\b(before|prior to|until|ahead of)( [a-z]+){0,5} $")
NEXT = re.compile(r"(next|next step|up next|plan|planned|下 一 步|计 划) : $")
AFTER = re.compile(r"\b(after|following|once)( the| a| an)? $")
OVER = re.compile(r"(之)?后|以后|完成|完毕|结束")
HOLD = _phrases("hold held")
STILL_HELD = frozenset("住起持紧牢")
CLEANING = frozenset({*"洗清擦拭", *map("".join, _phrases("clean wash rinse wipe irrigate flush"))})
LENSES = PhraseMatcher((word, True) for word in _phrases("""
    镜头 镜子 镜面 镜片 物镜 摄像头 lens camera scope laparoscope optic
"""))
# What happens to a lens that is then cleaned; one that zooms in or moves is not
DIRTY = frozenset({*"雾糊脏污沾染退拔取出拿", *map("".join, _phrases(
    "fog foggy fogging smear dirty blurred blurry stain out outside remove withdraw exit"))})
FLUIDS = frozenset({*"血液烟水汁脓渗雾", *map("".join, _phrases(
    "blood fluid smoke bile pus clot saline field view fluids debris plume pelvis abdomen"))})
APPLIERS = frozenset({"夹", *map("".join, _phrases("applier clipper applicator"))})
CLIPPED = re.compile(r"胆囊|动脉|静脉|血管|残端|近端|远端|断端|管|蒂|系膜")
CLIPPED_WORDS = frozenset(map("".join, _phrases("cystic artery duct vessel stump vein pedicle proximal distal")))
COMPLEMENTS = frozenset("了着过开断成住掉")
