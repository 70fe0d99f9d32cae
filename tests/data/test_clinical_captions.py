"""What a mention does in its clause, the clinical vocabulary of both taxonomies, and the check of a taxonomy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lapwan.data.labels import CaptionLabeller, label_caption, resolve_hint
from lapwan.data.taxonomy import Taxonomy, load_taxonomy
from lapwan.data.taxonomy_check import conflicts, use_of
from lapwan.errors import UserError
from tests.command_line import run_lapwan

TABLE = Path(__file__).with_name("captions_clinical.tsv")
LETTERS = {"surgical4": "SHUO", "cholec6": "BCGHIS"}
OWN = {"name": "own", "default": "rest", "families": [
    {"key": "saw", "keywords": ["saw", "锯"], "nouns": ["saw", "锯"]},
    {"key": "clamp", "keywords": ["clamp"], "verbs": ["clamp"], "nouns": ["clamp"]},
    {"key": "clip", "keywords": ["clip"], "materials": ["clip"]},
    {"key": "suction", "keywords": ["suction"], "actions": ["clear"], "verbs": ["clear"]},
    {"key": "rest", "keywords": ["forceps"]}]}


def families(label: object) -> set[int]:
    return set() if label.fallback else {i for i, weight in enumerate(label.weights) if weight}  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "column"), [("surgical4", 0), ("cholec6", 1)])
def test_the_development_captions_are_read_as_judged(name: str, column: int) -> None:
    labeller = CaptionLabeller(load_taxonomy(name))
    rows = [line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    wrong = [row for row in rows if families(labeller.label(row[2])) !=
             {LETTERS[name].index(letter) for letter in row[column] if letter != "-"}]
    assert len(rows) >= 500 and len(wrong) <= 0.01 * len(rows), wrong


@pytest.mark.parametrize(("caption", "family"), [
    ("the saw cuts the bone", "saw"), ("The surgeon saw the vessel", None), ("with an oscillating saw", "saw"),
    ("they saw bleeding", None), ("sawing through the bone", None), ("the saws are ready", "saw"),
    ("一把锯", "saw"), ("锯开胸骨", None),
    ("a clear view of the duct", None), ("The view is clear", None), ("to clear blood", "suction"),
    ("Clear the field", "suction"), ("clearing fluid", "suction"),
    ("the clamp is closed", "clamp"), ("the forceps clamp the vessel", "rest"),
    ("forceps lift the clipped duct", "rest"), ("the clipped duct", None), ("a clip is placed", "clip"),
    ("forceps pull between two clips", "rest"), ("clip-like shadow", None),
])
def test_parts_of_speech_of_a_taxonomy_of_ones_own(caption: str, family: str | None) -> None:
    taxonomy = Taxonomy.from_dict(OWN)
    expected = set() if family is None else {taxonomy.keys.index(family)}
    assert families(label_caption(caption, taxonomy)) == expected


def test_an_instrument_of_no_family_is_no_evidence() -> None:
    cholec = load_taxonomy("cholec6")
    assert label_caption("超声刀离断大网膜", cholec).fallback
    assert not label_caption("离断大网膜", cholec).fallback
    assert families(label_caption("抓钳牵拉，超声刀离断大网膜", cholec)) == {cholec.keys.index("grasper")}


# An instrument that leaves is seen, one that has left is not.
@pytest.mark.parametrize(("caption", "counted"), [
    ("电凝钩已退出，剪刀剪开", {0}), ("电凝钩退出，剪刀剪开", {0, 1}),
    ("The hook has left the field, scissors cut", {0}), ("剪刀（scissors）已撤出，电凝钩切割", {1}),
    ("剪断后无出血，剪刀已撤出，吸引器吸引", {2}), ("准备夹闭，剪刀剪开", {0}),
])
def test_what_has_left_and_what_is_to_come(caption: str, counted: set[int]) -> None:
    assert families(label_caption(caption, load_taxonomy("surgical4"))) == counted


def test_materials_are_hints_all_the_same() -> None:
    assert resolve_hint("clip", load_taxonomy("cholec6"))[1] == 1
    assert resolve_hint("gauze", load_taxonomy("surgical4"))[3] == 1


@pytest.mark.parametrize(("change", "said"), [
    ({"verbs": ["hop"]}, "'hop' is no keyword or action of 'saw'"),
    ({"materials": ["saw"]}, "'saw' is in materials and in verbs or nouns"),
])
def test_lists_of_parts_are_checked(change: dict[str, list[str]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Taxonomy.from_dict(OWN | {"families": [OWN["families"][0] | change, OWN["families"][-1]]})  # type: ignore


def test_taxonomies_without_the_new_lists_keep_their_fingerprint() -> None:
    plain = {"name": "x", "default": "b", "families": [{"key": "a", "keywords": ["hook"]}, {"key": "b"}]}
    assert Taxonomy.from_dict(plain).fingerprint == "945c2948ab54fa2d"
    assert set(Taxonomy.from_dict(plain).to_dict()) == {"name", "description", "default", "ignore", "families"}


def test_conflicts_and_what_captions_match() -> None:
    taxonomy = Taxonomy.from_dict({"name": "x", "default": "b", "ignore": ["video clip", "nothing"], "families": [
        {"key": "a", "keywords": ["saw", "clip"]}, {"key": "b", "keywords": ["forceps"]}]})
    lines = conflicts(taxonomy)
    assert any(line.startswith("'saw' of a has another meaning") for line in lines)
    assert any("'nothing' of ignore" in line and "video clip" not in line for line in lines)
    use = use_of(taxonomy, [("1", "saw and forceps"), ("2", "no forceps"), ("3", "liver")])
    assert {key: (entry.matched, entry.counted) for key, entry in use.phrases.items()} == {
        ("a", "saw"): (1, 1), ("b", "forceps"): (2, 1)}
    assert [at for at, _ in use.silent] == ["2", "3"] and use.several == 1 and use.unused == {"a": 1, "b": 0}


def test_the_check_and_the_plot_on_the_command_line(tmp_path: Path) -> None:
    clips = tmp_path / "c.csv"
    clips.write_text("video,text\na.mp4,抓钳牵拉\nb.mp4,剪刀剪断\n", encoding="utf-8")
    ran = run_lapwan("label", clips, "--check-taxonomy", "cholec6", "--report", tmp_path / "r.json")
    assert ran.code == 0 and "2 captions, 0 with several families" in ran.out
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["captions"] == 2
    ran = run_lapwan("label", clips, "--check-taxonomy", "cholec6", "-o", tmp_path / "l.jsonl")
    assert ran.code == 2 and "--check-taxonomy writes no labels" in ran.err and not (tmp_path / "l.jsonl").exists()
    ran = run_lapwan("label", "--check-taxonomy", "surgical4")
    assert ran.code == 0 and "'hold' of other" in ran.out
    ran = run_lapwan("label", clips, "-o", tmp_path / "l.jsonl", "--plot", tmp_path / "p.png")
    assert ran.code == 0, ran.err
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "add about 19 clips of Scissors" in ran.out
