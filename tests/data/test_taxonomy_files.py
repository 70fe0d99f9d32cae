"""Taxonomy files: the shipped ones, one of the user's own, and every way to get one wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lapwan.data.labels import label_caption
from lapwan.data.taxonomy import Taxonomy, load_taxonomy, shipped
from lapwan.errors import UserError

GOOD = """
default = "rest"
ignore = ["钩突"]
[[families]]
key = "hook"
names = ["Hook"]
names_zh = ["电凝钩"]
keywords = ["电凝钩", "钩", "hook"]
actions = ["切割"]
aliases = ["cautery"]
[[families]]
key = "rest"
"""


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_users_four_are_in_order() -> None:
    taxonomy = load_taxonomy("surgical4")
    assert [family.name for family in taxonomy.families] == ["Scissors", "Hook/Electrocautery", "Suction", "Other"]
    assert taxonomy.keys == ("scissors", "hook", "suction", "other")
    assert taxonomy.families[taxonomy.default].key == "other"
    documented = [["剪刀", "剪切", "剪断", "剪开"], ["电凝钩", "双极电凝", "电凝", "钩"],
                  ["吸引", "吸", "吸出", "清理"], ["抓钳", "戳卡", "镊子", "夹持", "标本袋"]]
    for family, words in zip(taxonomy.families, documented, strict=True):
        assert set(words) <= set(family.keywords)


@pytest.mark.parametrize("name", shipped())
def test_shipped_ones_survive_embedding(name: str) -> None:
    taxonomy = load_taxonomy(name)
    again = Taxonomy.from_dict(json.loads(json.dumps(taxonomy.to_dict())))
    assert again == taxonomy
    assert again.fingerprint == taxonomy.fingerprint
    assert label_caption("电凝钩", again) == label_caption("电凝钩", taxonomy)


def test_fingerprint_follows_what_labels_depend_on() -> None:
    taxonomy = load_taxonomy("surgical4")
    described = dataclasses.replace(taxonomy, description="another text")
    reordered = dataclasses.replace(taxonomy, families=taxonomy.families[::-1])
    fewer = dataclasses.replace(taxonomy, ignore=())
    prints = [t.fingerprint for t in (taxonomy, reordered, fewer, load_taxonomy("cholec6"))]
    assert described.fingerprint == taxonomy.fingerprint
    assert len(set(prints)) == 4


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    taxonomy = load_taxonomy(write(tmp_path, GOOD))
    assert taxonomy.name == "mine"
    assert taxonomy.families[1].name == "Rest"
    assert label_caption("电凝钩切割", taxonomy).weights == (1, 0)
    assert label_caption("胰腺钩突", taxonomy).fallback


@pytest.mark.parametrize(("old", "new", "said"), [
    ('keywords = ["电凝钩", "钩", "hook"]', "keywords = []", "family 'hook' is empty"),
    ('key = "rest"', 'key = "rest"\nkeywords = ["钩"]', "'钩' is in keywords of 'hook' and in keywords of 'rest'"),
    ('key = "rest"', 'key = "rest"\nkeywords = ["hooks"]', "'hook' = 'hooks' is in keywords of 'hook'"),
    ('key = "rest"', 'key = "rest"\nkeywords = ["電凝鉤"]', "'电凝钩' = '電凝鉤' is in"),
    ('key = "rest"', 'key = "rest"\nactions = ["钩"]', "'钩' is in keywords of 'hook' and in actions of 'rest'"),
    ('key = "rest"', 'key = "rest"\naliases = ["Cautery"]', "is in aliases of 'hook' and in aliases of 'rest'"),
    ('actions = ["切割"]', 'actions = ["钩"]', "'钩' is a keyword and an action of 'hook'"),
    ('ignore = ["钩突"]', 'ignore = ["钩"]', "'钩' is in keywords of 'hook' and in 'ignore'"),
    ('names_zh = ["电凝钩"]', 'name_zh = ["电凝钩"]', "families[0]: unknown key 'name_zh' (did you mean 'names_zh'?)"),
    ('default = "rest"', 'defualt = "rest"', "unknown key 'defualt' (did you mean 'default'?)"),
    ('default = "rest"', 'default = "rset"', "'rset' is not a family (did you mean 'rest'?); one of: hook, rest"),
    ('default = "rest"', "", "'default' is required"),
    ('default = "rest"', "default = 1", "default = 1: must be a string"),
    ('key = "rest"', 'key = "hook"', "two families have the key 'hook'"),
    ('key = "rest"', 'key = "其他"', "families[1].key = '其他'"),
    ('key = "rest"', "", "'families[1].key' is required"),
    ('actions = ["切割"]', 'actions = "切割"', "families[0].actions = '切割': must be a list of strings"),
    ('actions = ["切割"]', 'actions = [" "]', "families[0].actions: empty phrase ' '"),
    ("[[families]]\nkey = \"rest\"", "", "'rest' is not a family; one of: hook"),
])
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load_taxonomy(path)
    assert said in str(error.value)
    assert path in str(error.value)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 problems") as error:
        load_taxonomy(write(tmp_path, GOOD.replace("ignore", "ignroe").replace("aliases", "alias")))
    assert "'ignroe'" in str(error.value) and "'alias'" in str(error.value)


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown taxonomy 'surgcal4' .did you mean 'surgical4'.*cholec6, surgical4"):
        load_taxonomy("surgcal4")
    with pytest.raises(UserError, match="no such taxonomy file"):
        load_taxonomy(str(tmp_path / "none.toml"))
    with pytest.raises(UserError, match="not valid TOML"):
        load_taxonomy(write(tmp_path, "default = "))
    (tmp_path / "latin.toml").write_bytes("default = 'é'".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*latin.toml: not UTF-8"):
        load_taxonomy(str(tmp_path / "latin.toml"))
