"""Prompts in the forms people have them, and the split by seed."""

from __future__ import annotations

import pytest

from lapwan.data.prompts import choose_held_out, count_chinese, read_prompts
from lapwan.errors import UserError

WANT = ["剪刀剪断血管", "a hook cuts"]


@pytest.mark.parametrize(("name", "text"), [
    ("captions.json", '[{"caption": "剪刀剪断血管"}, {"caption": " a hook cuts "}, {"caption": "a hook cuts"}]'),
    ("captions.json", '["剪刀剪断血管", "a hook cuts"]'),
    ("prompts.yaml", "prompts:\n  - 剪刀剪断血管\n  - a hook cuts\n"),
    ("prompts.yml", "- 剪刀剪断血管\n- a hook cuts\n"),
    ("clips.jsonl", '{"caption": "剪刀剪断血管", "video_path": "a.mp4"}\n{"caption": "a hook cuts"}\n'),
    ("prompts.txt", "\ufeff剪刀剪断血管\n\n  a hook cuts\n"),
])
def test_every_form_gives_the_same_prompts(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert read_prompts(path) == WANT


@pytest.mark.parametrize(("name", "text", "said"), [
    ("a.json", "[1]", "entry 1 is 1; expected a list of objects"), ("a.json", '{"x": 1}', "expected a list of objects"),
    ("a.json", "[", "not valid JSON"), ("a.yaml", "prompts: [", "not valid YAML"),
    ("a.yaml", "prompts: 3", "expected `prompts:` with a list"), ("a.txt", "\n", "contains no prompt"),
    ("a.yaml", "!!python/object/apply:os.getcwd []", "not valid YAML"),  # a prompt file is data, never code
])
def test_what_is_not_prompts_is_said(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_prompts(path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_says_what_prompts_may_be(tmp_path):
    with pytest.raises(UserError, match="prompts are captions"):
        read_prompts(tmp_path / "none.txt")


def test_held_out_prompts_follow_from_seed_and_text():
    prompts = [f"prompt {i}" for i in range(40)]
    chosen = choose_held_out(prompts, 8, 1)
    assert len(chosen) == 8 and chosen == choose_held_out(prompts[::-1] + prompts, 8, 1)
    assert chosen != choose_held_out(prompts, 8, 2)
    fewer = choose_held_out([p for p in prompts if p not in sorted(chosen)[:2]], 8, 1)
    assert len(fewer & chosen) == 6, "what is left keeps its lot"
    with pytest.raises(UserError, match="= 40 of 40 distinct prompts leaves none to train on"):
        choose_held_out(prompts, 40, 1)


def test_chinese_is_counted():
    assert count_chinese(["hook", "电凝钩 cuts", "剪刀"]) == 2
