"""Rewards as texts and as tables; what is misspelt is answered with what is meant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest

from lapwan.errors import UserError
from lapwan.settings.base import Flag, Settings, to_toml
from lapwan.settings.load import load
from lapwan.settings.rewards import HpsSettings, PickScoreSettings, Rewards, TinyRewardSettings, reward_weights


class Holder(Settings):
    rewards: Annotated[Rewards, Flag("--reward")] = (TinyRewardSettings(),)


def _said(value: object) -> Rewards:
    return load(Holder, options={"rewards": value}, environment={}).rewards


def test_texts_and_tables_are_one():
    table = {"type": "hps", "path": "/w/HPS.pt", "weight": 0.5}
    expected = (HpsSettings(path=Path("/w/HPS.pt"), weight=0.5), TinyRewardSettings())
    assert _said(["hps=/w/HPS.pt:0.5", "tiny"]) == _said([table, {"type": "tiny"}]) == expected
    assert _said("pickscore=a:b=c") == (PickScoreSettings(path=Path("a:b=c")),)  # no number: of the path
    assert reward_weights(expected) == {"hps": 0.5, "tiny": 1.0}
    assert expected[0].preprocess == "pad" and PickScoreSettings(path=Path("a")).preprocess == "crop"


def test_the_resolved_settings_say_the_same_again(tmp_path):
    first = load(Holder, options={"rewards": ["hps=/w/HPS.pt:0.5", "clip=/w/clip"]}, environment={})
    (tmp_path / "settings.toml").write_text(to_toml(first))
    assert load(Holder, tmp_path / "settings.toml", environment={}) == first


@pytest.mark.parametrize(("value", "said"), [
    (["hpz=a"], "unknown reward 'hpz' (did you mean 'hps'?)"),
    (["hps"], "hps needs a path: hps=PATH"),
    (["tiny=a"], "tiny takes no path"),
    (["tiny:0"], "rewards[0].weight = 0.0: must be greater than 0"),
    (["tiny", "tiny"], "two rewards are called tiny; give one of them a name"),
    ([], "no reward is given; give at least one of"),
    ([{"type": "clop"}], "type = 'clop'; a reward's type is one of hps, clip, pickscore, tiny"),
    ([{"path": "a"}], "type = None; a reward's type is one of"),
    ([{"type": "clip", "path": "a", "weigt": 1}], "unknown key 'rewards[0].weigt' (did you mean 'weight'?)"),
    ([{"type": "tiny", "path": "a"}], "unknown key 'rewards[0].path'; known here: name, type, weight"),
    ([{"type": "clip"}], "'rewards[0].path' is required"),
    ([{"type": "clip", "path": "a", "preprocess": "stretch"}], "rewards[0].preprocess = 'stretch': must be 'pad', "),
])
def test_a_mistake_is_named(value, said):
    with pytest.raises(UserError) as error:
        _said(value)
    assert said in str(error.value) and "\n" not in str(error.value)
