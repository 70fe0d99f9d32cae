"""Captions in the users' style: mostly Chinese, some English, each true of its scene.

A caption may omit the motion only if it is the instrument's default (`motion.CHARACTERISTIC`) in its default direction,
so the first frame and the caption together always determine the path. It may omit the entry side, which the first frame
shows. Captions of neutral scenes name no instrument and no target, but always the motion.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lapwan.tiny import motion as paths

if TYPE_CHECKING:
    from lapwan.tiny.scenes import SceneSpec

ENGLISH_SHARE = 0.2
_TWO_SENTENCES = 0.2

_ZH_NAME = {
    "scissors": ("剪刀", "剪刀", "腔镜剪刀", "组织剪刀"),
    "hook": ("电凝钩", "电凝钩", "L型电凝钩", "单极电凝钩"),
    "suction": ("吸引器", "吸引器", "吸引管", "吸引"),
    "grasper": ("抓钳", "抓钳", "腔镜抓钳", "无损伤抓钳"),
}
_ZH_VERB = {
    "scissors": ("剪断", "剪开", "剪切"),
    "hook": ("切割", "切断", "分离", "电凝"),
    "suction": ("清理", "吸净", "吸出"),
    "grasper": ("抓取", "夹持", "夹住", "抓住"),
}
_ZH_TARGET = {
    "tissue": ("组织", "组织", "软组织"),
    "vessel": ("血管", "血管", "小血管"),
    "adhesion": ("粘连", "粘连", "粘连带"),
    "gallbladder": ("胆囊", "胆囊", "胆囊壁"),
    "ligament": ("韧带", "韧带", "韧带组织"),
    "bag": ("标本袋",),
    "blood": ("术野", "积血", "出血", "术野积血"),
    "fluid": ("积液", "胆汁", "术野积液"),
}
_ZH_SIDE = {"left": "左侧", "right": "右侧", "top": "上方", "bottom": "下方"}
_ZH_ENTER = ("进入", "伸入", "进入视野", "进入术野")
_ZH_DIRECTION = {"left": "向左", "right": "向右", "up": "向上", "down": "向下", "clockwise": "顺时针",
           "counterclockwise": "逆时针", "inward": "", "outward": ""}
_ZH_MOTION = {
    "advance": ("向前推进", "向前伸入"),
    "pull": ("反复向后回拉", "反复向后牵拉"),
    "stroke": ("{direction}划动", "{direction}移动"),
    "sweep": ("先{direction}来回扫动", "先{direction}来回摆动"),
    "circle": ("{direction}画圈", "{direction}转圈"),
    "lift": ("{direction}牵开", "{direction}牵拉"),
    "retract": ("向外拉回", "向后回撤"),
}
_ZH_LIFT_UP = ("向上提起", "向上提拉")
# For the neutral style: without words that a taxonomy of instruments may count as evidence.
_ZH_BARE_MOTION = {**_ZH_MOTION, "pull": ("反复向后回拉", "反复向后移动"), "lift": ("先向前再{direction}移动",),
                   "retract": ("先向前再向后回撤",)}

_EN_NAME = {
    "scissors": ("scissors", "laparoscopic scissors"),
    "hook": ("an electrocautery hook", "a hook"),
    "suction": ("a suction tube", "a suction tip"),
    "grasper": ("a grasper", "a laparoscopic grasper"),
}
_EN_VERB = {  # third person, -ing
    "scissors": (("cut", "cutting"), ("divide", "dividing")),
    "hook": (("cuts", "cutting"), ("dissects", "dissecting"), ("cauterizes", "cauterizing")),
    "suction": (("clears", "clearing"), ("removes", "removing")),
    "grasper": (("grasps", "grasping"), ("holds", "holding")),
}
_EN_TARGET = {"tissue": "tissue", "vessel": "vessel", "adhesion": "adhesion", "gallbladder": "gallbladder",
              "ligament": "ligament", "bag": "specimen bag", "blood": "blood", "fluid": "fluid"}
_EN_SIDE = {"left": "from the left", "right": "from the right", "top": "from above", "bottom": "from below"}
_EN_DIRECTION = {"left": "to the left", "right": "to the right", "up": "upward", "down": "downward"}
_EN_MOTION = {  # third person of one tool; scissors take the plural
    "advance": "moves forward", "pull": "pulls back repeatedly", "stroke": "moves {direction}",
    "sweep": "sweeps back and forth, first {direction},", "circle": "circles {direction}",
    "lift": "pulls it {direction}", "retract": "draws it outward",
}
_EN_BARE_MOTION = {**_EN_MOTION, "pull": "moves back repeatedly", "lift": "moves forward and then {direction}",
                   "retract": "moves forward and then backward", "sweep": "sweeps back and forth, first {direction}"}
_HOLDING = ("lift", "retract")  # first take hold of the target, then move it


def caption_for(spec: SceneSpec, rng: np.random.Generator, english: float = ENGLISH_SHARE) -> str:
    """A caption that is true of the scene; `english` is the probability of an English one.

    A second instrument comes first: 抓钳固定，电凝钩切割组织.
    """
    if spec.second is not None:
        return _with_second(spec, rng, english)
    in_english = rng.uniform() < english
    if spec.style == "neutral":
        return _neutral_english(spec, rng) if in_english else _neutral_chinese(spec, rng)
    return _english(spec, rng) if in_english else _chinese(spec, rng)


def _with_second(spec: SceneSpec, rng: np.random.Generator, english: float) -> str:
    first = replace(spec, second=None)
    in_english = rng.uniform() < english
    text = caption_for(first, rng, float(in_english))
    if spec.style == "neutral":
        return f"Another tool holds still. {text}" if in_english else f"另一件工具固定，{text}"
    name = _pick(rng, (_EN_NAME if in_english else _ZH_NAME)[str(spec.second)])
    if not in_english:
        return f"{name}固定，{text}"
    return f"{_sentence(name)} {'hold' if spec.second == 'scissors' else 'holds'} still. {text}"


def describe_action(spec: SceneSpec, rng: np.random.Generator, english: float = 0.5) -> str:
    """Motion, verb and target of the scene without the instrument's name; the verb may still be a keyword."""
    if rng.uniform() < english:
        does, doing = _EN_VERB[spec.instrument][int(rng.integers(len(_EN_VERB[spec.instrument])))]
        target, move = _EN_TARGET[str(spec.target)], _english_move(_EN_MOTION, spec)
        act = f"{does} the {target}"
        if spec.instrument == "scissors":
            move = _plural(move)
        if _is_default(spec) and rng.uniform() < 0.5:
            return _sentence(f"{doing} the {target}")
        return _sentence(f"{act} and {move}" if spec.motion in _HOLDING else f"{move} and {act}")
    act = _pick(rng, _ZH_VERB[spec.instrument]) + _pick(rng, _ZH_TARGET[str(spec.target)])
    lifts_up = spec.motion == "lift" and spec.direction == "up"
    move = _pick(rng, _ZH_LIFT_UP if lifts_up else _ZH_MOTION[str(spec.motion)]).format(
        direction=_ZH_DIRECTION[str(spec.direction)])
    return f"{act}并{move}" if spec.motion in _HOLDING else f"{move}{act}"


def _is_default(spec: SceneSpec) -> bool:
    motion = paths.CHARACTERISTIC[spec.instrument][0]
    return spec.motion == motion and spec.direction == paths.MOTIONS[motion][0]


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _chinese(spec: SceneSpec, rng: np.random.Generator) -> str:
    name, verb = _pick(rng, _ZH_NAME[spec.instrument]), _pick(rng, _ZH_VERB[spec.instrument])
    targets = _ZH_TARGET[str(spec.target)]
    if verb != "清理":  # a field of view is cleared, not removed
        targets = tuple(word for word in targets if word != "术野")
    act = verb + _pick(rng, targets)
    side = _ZH_SIDE[spec.side]
    lifts_up = spec.motion == "lift" and spec.direction == "up"
    phrases = _ZH_LIFT_UP if lifts_up else _ZH_MOTION[str(spec.motion)]
    move = _pick(rng, phrases).format(direction=_ZH_DIRECTION[str(spec.direction)])
    action = f"{act}并{move}" if spec.motion in _HOLDING else f"{move}{act}"
    if rng.uniform() < _TWO_SENTENCES:
        return f"{name}从{side}{_pick(rng, _ZH_ENTER)}。{action}。"
    forms = [f"{name}{action}", f"{side}{name}{action}", f"{name}从{side}{_pick(rng, _ZH_ENTER[:2])}，{action}"]
    if _is_default(spec):
        forms += [f"{name}{act}", f"{name}{act}", f"{side}{name}{act}", f"{name}从{side}{act}"]
    return _pick(rng, tuple(forms))


def _neutral_chinese(spec: SceneSpec, rng: np.random.Generator) -> str:
    name, side = _pick(rng, ("工具", "一件工具", "灰色工具")), _ZH_SIDE[spec.side]
    move = _pick(rng, _ZH_BARE_MOTION[str(spec.motion)]).format(direction=_ZH_DIRECTION[str(spec.direction)])
    enters = f"{name}从{side}进入"
    return _pick(rng, (f"{name}{move}", f"{side}{name}{move}", f"{enters}，{move}", f"{enters}。{move}。"))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _plural(phrase: str) -> str:
    """`moves down` -> `move down`: only the first word, the verb, changes."""
    verb, _, rest = phrase.partition(" ")
    return " ".join(filter(None, (verb.removesuffix("s"), rest)))


def _english_move(table: dict[str, str], spec: SceneSpec) -> str:
    if table is _EN_MOTION and spec.motion == "lift" and spec.direction == "up":
        return "lifts it upward"
    return table[str(spec.motion)].format(direction=_EN_DIRECTION.get(str(spec.direction), str(spec.direction)))


def _english(spec: SceneSpec, rng: np.random.Generator) -> str:
    many = spec.instrument == "scissors"
    name, side, target = _pick(rng, _EN_NAME[spec.instrument]), _EN_SIDE[spec.side], _EN_TARGET[str(spec.target)]
    verbs = _EN_VERB[spec.instrument]
    does, doing = verbs[int(rng.integers(len(verbs)))]
    move, enter = _english_move(_EN_MOTION, spec), "enters"
    if many:
        move, enter = _plural(move), "enter"
    act = f"{does} the {target}"
    action = f"{act} and {move}" if spec.motion in _HOLDING else f"{move} and {act}"
    if rng.uniform() < _TWO_SENTENCES:
        return _sentence(f"{name} {enter} {side}. {'They' if many else 'It'} {action}.")
    forms = [f"{name} {action}", f"{name} {enter} {side}, {action}"]
    if _is_default(spec):
        forms += [f"{name} {doing} the {target}", f"{name} {side} {doing} the {target}"]
    return _sentence(_pick(rng, tuple(forms)))


def _neutral_english(spec: SceneSpec, rng: np.random.Generator) -> str:
    move, side = _english_move(_EN_BARE_MOTION, spec), _EN_SIDE[spec.side]
    return _sentence(_pick(rng, (f"a tool {move}", f"a tool enters {side} and {move}")))
