"""The forms in which people hand over clips and captions: folders, tables, lists, encodings, and their mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lapwan.data.clip_file import LONGEST_LINE, ClipFile, read_clips
from lapwan.data.clips import read_source_clips, resolve_video
from lapwan.data.dataset import read_dataset
from lapwan.data.musubi_dataset import is_musubi, musubi_rows
from lapwan.data.text_encoding import UnreadableText, decode
from lapwan.errors import UserError
from lapwan.files import expand_setting, expand_user
from lapwan.settings.cache import CacheSettings
from tests.bench.bench_encodings import CHINESE, WESTERN

TABLE = "video,prompt\na.mp4,抓钳牵拉\nb.mp4,\"剪刀, 剪断\"\n"


def files(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


def captions(path: Path, **options: object) -> list[tuple[str, str]]:
    source = read_source_clips(path, **options)  # type: ignore[arg-type]
    return [(clip.path.name, clip.caption) for clip in source.clips]


def test_a_folder_with_captions_beside_the_clips(tmp_path: Path) -> None:
    folder = files(tmp_path / "v", "a.mp4", "b.MTS", "c.webp", "d.mov", ".hidden.mp4", "notes.md", "deep/e.mp4")
    (folder / "a.txt").write_text("抓钳\n", encoding="utf-8")
    (folder / "b.caption").write_text("hook", encoding="utf-8")
    (folder / "c.webp.txt").write_text("scissors", encoding="utf-8")
    (folder / "deep/e.txt").write_text("clip", encoding="utf-8")
    (folder / "lost.txt").write_text("of no clip", encoding="utf-8")
    source = read_source_clips(folder)
    assert captions(folder) == [("a.mp4", "抓钳"), ("b.MTS", "hook"), ("c.webp", "scissors")]
    assert [(drop.name, drop.reason) for drop in source.drops] == [("d.mov", "no caption file d.txt or d.caption")]
    for part in ("1 hidden", "1 sub-folder", "1 .md file", "1 caption of no clip"):
        assert part in source.notes[0]
    assert ("e.mp4", "clip") in captions(folder, recursive=True)


def test_an_empty_folder_names_its_sub_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no videos or images; it has sub-folders: add --recursive"):
        read_source_clips(files(tmp_path / "v", "deep/a.mp4"))
    with pytest.raises(UserError, match=r"holds no videos or images$"):
        read_source_clips(files(tmp_path / "w"))


@pytest.mark.parametrize(("name", "text"), [
    ("l.csv", TABLE), ("l.csv", TABLE.replace("video,", "File Name,").replace("prompt", "text")),
    ("l.csv", "\ufeff" + TABLE), ("l.csv", 'video;prompt\na.mp4;抓钳牵拉\nb.mp4;剪刀, 剪断\n'),
    ("l.tsv", "path\tcaption\na.mp4\t抓钳牵拉\nb.mp4\t剪刀, 剪断\n"), ("l.csv", TABLE.replace("\n", "\r\n")),
    ("l.json", '[{"video": "a.mp4", "text": "抓钳牵拉"}, {"file": "b.mp4", "prompt": "剪刀, 剪断"}]'),
    ("l.json", '{"data": [{"path": "a.mp4", "caption": "抓钳牵拉"}, {"path": "b.mp4", "caption": "剪刀, 剪断"}]}'),
    ("l.json", '{"a.mp4": "抓钳牵拉", "b.mp4": {"caption": "剪刀, 剪断"}}'),
    ("l.jsonl", '{"file_name": "a.mp4", "text": "抓钳牵拉"}\n{"video_path": "b.mp4", "caption": "剪刀, 剪断"}\n'),
    ("l.json", '{"file_name": "a.mp4", "text": "抓钳牵拉"}\n{"video_path": "b.mp4", "caption": "剪刀, 剪断"}\n'),
])
def test_lists_of_other_tools(tmp_path: Path, name: str, text: str) -> None:
    files(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert captions(tmp_path / name) == [("a.mp4", "抓钳牵拉"), ("b.mp4", "剪刀, 剪断")]
    assert not is_musubi(tmp_path / name)


def test_lists_inside_a_folder(tmp_path: Path) -> None:
    folder = files(tmp_path / "v", "a.mp4", "b.mp4")
    (folder / "prompts.txt").write_text("hook\nscissors\n", encoding="utf-8")
    (folder / "videos.txt").write_text("a.mp4\nb.mp4\n", encoding="utf-8")
    assert captions(folder) == [("a.mp4", "hook"), ("b.mp4", "scissors")]
    (folder / "metadata.csv").write_text(TABLE, encoding="utf-8")
    assert captions(folder)[0] == ("a.mp4", "抓钳牵拉")
    (folder / "metadata.jsonl").write_text('{"file_name": "b.mp4", "text": "x"}\n', encoding="utf-8")
    assert captions(folder) == [("b.mp4", "x")]
    assert "metadata.jsonl in" in read_source_clips(folder).notes[0]


def test_the_columns_are_named_in_the_plan(tmp_path: Path) -> None:
    files(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "l.csv").write_text(TABLE, encoding="utf-8")
    assert "video_path = 'video', caption = 'prompt'" in read_source_clips(tmp_path / "l.csv").notes[0]


@pytest.mark.parametrize(("text", "said"), [
    ("a.mp4,hook\n", "begins with a clip; its first line must name the columns"),
    ("video,weather\na.mp4,hook\n", "no column of captions (caption, text, prompt) among 'video', 'weather'"),
    ("id,caption\n1,hook\n", "no column of videos"), ("", "is empty"),
    ("video,caption\na.mp4,one,two\n", "3 columns where the header has 2"),
])
def test_tables_that_say_too_little(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "l.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_source_clips(tmp_path / "l.csv")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_quote_that_never_closes_costs_its_line_only(tmp_path: Path) -> None:
    files(tmp_path, "a.mp4")
    rows = ['a.mp4,"over\ntwo lines"', 'a.mp4,"open', *['a.mp4,after'] * 60, 'a.mp4,5" trocar', 'a.mp4,"say ""hi"""']
    (tmp_path / "l.csv").write_text("video,caption\n" + "\n".join(rows) + "\n", encoding="utf-8")
    source = read_source_clips(tmp_path / "l.csv")
    texts = [clip.caption for clip in source.clips]
    assert texts == ["over\ntwo lines", *["after"] * 60, '5" trocar', 'say "hi"']
    assert [(d.name, d.reason) for d in source.drops] == [("l.csv, line 4", "a quote that opens here is never closed")]


BAD_LINES: tuple[str | bytes, ...] = (
    '{"video_path": "a.mp4", "caption": ', '{"video_path": "a.mp4", "caption": "\\ud83d"}',
    '{"video_path": "a.mp4", "caption": "x\\u0000y"}', json.dumps({"video_path": "n" * 5000, "caption": "x"}),
    '{"video_path": "a\\u0000.mp4", "caption": "x"}', '{"video_path": "\\ud83d.mp4", "caption": "x"}',
    '{"video_path": 3, "caption": "x"}', '{"caption": "x"}', "[" * 5000,
    b'{"video_path": "a.mp4", "caption": "\x81 "}',
    '{"video_path": "a.mp4", "caption": "x", "control_path": "c.mp4"}',
    '{"video_path": "a.mp4", "caption": "x", "roi": 1}',
    '{"video_path": "a.mp4", "caption": "x", "mask_path": "none.png"}',
    b'{"caption": "' + b"x" * (LONGEST_LINE + 9) + b'"}',
)


def test_one_bad_line_never_ends_the_run(tmp_path: Path) -> None:
    files(tmp_path, "a.mp4")
    good = b'{"video_path": "a.mp4", "caption": "hook"}\n'
    lines = [line if isinstance(line, bytes) else line.encode() for line in BAD_LINES]
    (tmp_path / "l.jsonl").write_bytes(good + b"\n".join(lines) + b"\n" + good)
    source = read_source_clips(tmp_path / "l.jsonl")
    assert [clip.caption for clip in source.clips] == ["hook", "hook"]
    assert sorted(int(drop.name.partition("line ")[2].split()[0]) for drop in source.drops) == [
        *range(2, 2 + len(BAD_LINES))]
    for drop in source.drops:
        (drop.name + drop.reason).encode()
        assert len(drop.reason) < 700
    (tmp_path / "m.jsonl").write_bytes(b"\n".join(lines[:3]))
    with pytest.raises(UserError, match=r"no line of it can be used; m.jsonl, line 1: broken JSON"):
        read_source_clips(tmp_path / "m.jsonl")


@pytest.mark.parametrize(("encoding", "name"), [
    ("utf-8", ""), ("utf-8-sig", ""), ("utf-16", "UTF-16"), ("gb18030", "GB18030 (GBK)"),
])
def test_chinese_captions_in_every_encoding(tmp_path: Path, encoding: str, name: str) -> None:
    files(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "l.csv").write_bytes(TABLE.encode(encoding))
    (tmp_path / "l.jsonl").write_bytes('{"video": "a.mp4", "text": "抓钳牵拉"}\n'.encode(encoding))
    (tmp_path / "a.txt").write_bytes("抓钳牵拉".encode(encoding))
    for path in (tmp_path / "l.csv", tmp_path / "l.jsonl", tmp_path):
        source = read_source_clips(path)
        assert source.clips[0].caption == "抓钳牵拉"
        assert any(name in note for note in source.notes if "not UTF-8" in note) == bool(name)


def test_a_list_in_utf_16_that_ends_in_a_character_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_bytes('{"video": "a.mp4", "text": "hook"}\n'.encode("utf-16")[:-1])
    for strict in (True, False):
        with pytest.raises(UserError, match=r"cannot read .*l.jsonl: not UTF-16"):
            list(ClipFile(tmp_path / "l.jsonl", strict=strict))


def test_short_captions_are_told_apart_both_ways() -> None:
    chinese = [text for text in CHINESE if decode(text.encode("gbk"))[0] != text]
    western = [text for text in WESTERN if decode(text.encode("cp1252"))[0] != text]
    assert len(CHINESE) >= 100 and len(chinese) <= 2, chinese
    assert len(WESTERN) >= 100 and len(western) <= 2, western
    everywhere = [*CHINESE, *WESTERN, "Привет", "Ελληνικά", "שלום", "čeština", "µm ± 5", "tiếng Việt"]
    assert [text for text in everywhere if decode(text.encode()) != (text, "")] == []


def test_an_encoding_may_be_given() -> None:
    assert decode("電凝".encode("big5"), "big5")[0] == "電凝"
    assert decode("\ufeff抓钳".encode(), "cp1252") == ("抓钳", "")  # its mark goes first
    with pytest.raises(UnreadableText, match="set caption_encoding"):
        decode(b"\xff\xff", "ascii")
    with pytest.raises(UnreadableText, match="NUL"):
        decode("hook".encode("utf-16-le"))
    with pytest.raises(ValueError, match="gb18030"):
        CacheSettings(verify=True, caption_encoding="klingon")


def test_unreadable_captions_cost_their_clip_only(tmp_path: Path) -> None:
    folder = files(tmp_path / "v", "a.mp4", "b.mp4", "c.mp4")
    (folder / "a.txt").write_bytes(b"\0\1\2")
    (folder / "b.txt").write_text(" \n", encoding="utf-8")
    (folder / "c.txt").write_text("hook", encoding="utf-8")
    source = read_source_clips(folder)
    assert [clip.caption for clip in source.clips] == ["hook"]
    assert [drop.reason.split(":")[0] for drop in source.drops] == ["caption a.txt", "empty caption b.txt"]


def test_home_and_environment_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLIPS", str(tmp_path))
    files(tmp_path, "a.mp4", "$odd.mp4")
    for name in ("~/a.mp4", "$CLIPS/a.mp4", "${CLIPS}/a.mp4"):
        assert resolve_video(name, tmp_path / "l.jsonl") == tmp_path / "a.mp4"
    assert resolve_video("$odd.mp4", tmp_path / "l.jsonl") == tmp_path / "$odd.mp4"  # a name of its own
    settings = CacheSettings.model_validate({"dataset": "~/l.csv", "model": "$CLIPS/model", "output": "${CLIPS}/c"})
    assert (settings.dataset, settings.model, settings.output) == (
        tmp_path / "l.csv", str(tmp_path / "model"), tmp_path / "c")
    assert expand_setting("high=~/a.safetensors:0.8") == f"high={tmp_path}/a.safetensors:0.8"
    assert expand_setting("a ~ b, $5 each") == "a ~ b, $5 each"
    assert expand_user("~nobody-here/x") == Path("~nobody-here/x")


def test_musubi_datasets_can_be_labelled(tmp_path: Path) -> None:
    files(tmp_path / "v", "a.mp4")
    (tmp_path / "v/a.txt").write_bytes("抓钳牵拉胆囊".encode("gb18030"))
    files(tmp_path, "b.mp4")
    (tmp_path / "l.jsonl").write_text('{"video_path": "b.mp4", "caption": "hook"}\n{\n', encoding="utf-8")
    (tmp_path / "d.toml").write_text(
        f'[[datasets]]\nvideo_directory = "{tmp_path}/v"\ncaption_extension = ".txt"\n'
        f'[[datasets]]\nvideo_jsonl_file = "{tmp_path}/l.jsonl"\ncache_directory = "{tmp_path}/c"\n', encoding="utf-8")
    rows = musubi_rows(tmp_path / "d.toml")
    clips = read_clips(tmp_path / "d.toml", strict=False, rows=rows)
    assert [(Path(clip.data["video_path"]), clip.caption) for clip in clips] == [
        (tmp_path / "v/a.mp4", "抓钳牵拉胆囊"), (tmp_path / "b.mp4", "hook")]
    assert [drop.name for drop in clips.drops] == ["l.jsonl, line 2"]


def test_no_dataset_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; expected a folder of videos with captions"):
        read_dataset(tmp_path / "none", tmp_path, None)  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_list_without_end_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"is longer than 256 MiB|is larger than 256 MiB"):
        read_source_clips(tmp_path / name)


def test_a_video_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    with pytest.raises(UserError, match=r"a\.mp4 is a video or an image; a list of clips, or their folder"):
        read_source_clips(tmp_path / "a.mp4")


def test_a_reason_does_not_repeat_its_line(tmp_path: Path) -> None:
    files(tmp_path, "a.mp4")
    line = {"video_path": "a.mp4", "caption": "a hook", "start": -1}
    (tmp_path / "c.jsonl").write_text(json.dumps(line), encoding="utf-8")
    with pytest.raises(UserError, match=r"c\.jsonl: no line of it can be used; c\.jsonl, line 1: start = -1"):
        read_source_clips(tmp_path / "c.jsonl")
